"""A build that is killed at any point goes on where it was, redoes nothing that was finished, and
gives the bytes of an undisturbed build.
"""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_tokenizer
from small_builds import SMALL, hashes, small_recipe
from small_run import REPOSITORY
from watched_build import events_in, run_watched

from icl_moe.locks import locked

Run = Callable[[Path, Path, int, float], int]
"""Runs a watched build into a folder, with a log, and kills it at an event, or never (0)."""


def finished(out: Path) -> set[str]:
    """What is finished in a folder: scenes, images' checks, chunks of codes, shards."""
    patterns = ("synthetic", ".build/images-*.json", ".build/codes-*.npy", "*.tar")
    return {path.relative_to(out).as_posix() for each in patterns for path in out.glob(each)}


def made(log: Path) -> set[str]:
    """What a build made: the files and folders that it renamed into their place."""
    lines = (line.split(" ", 1) for line in events_in(log))
    return {name for kind, name in lines if kind == "os.rename"}


def check_kills(run: Run, undisturbed: Path, folder: Path, points: int, seed: int) -> None:
    """Kill builds at random points, let each go on, and compare."""
    assert run(folder / "whole", folder / "whole.log", 0, 0.0) == 0
    assert hashes(folder / "whole") == hashes(undisturbed)
    events = len(events_in(folder / "whole.log"))
    rng = random.Random(seed)
    for number in range(points):
        out, log = folder / str(number), folder / f"{number}.log"
        event, seconds = rng.randint(1, events), rng.choice([0.0, rng.uniform(0.0, 0.3)])
        killed = run(out, log, event, seconds)
        assert killed not in (0, 2), f"killed at {event}"
        before = finished(out)
        again = folder / f"{number}.again.log"
        assert run(out, again, 0, 0.0) == 0
        assert hashes(out) == hashes(undisturbed), f"killed at {event}"
        assert not list(out.rglob("*.partial*"))
        assert not (out / ".build").exists()
        assert not before & made(again), f"killed at {event}"


@pytest.mark.parametrize(
    ("points", "workers"),
    [(3, 0), pytest.param(20, 2, marks=pytest.mark.slow)],
)
def test_a_build_killed_at_random_points_goes_on_where_it_was(
    demo, tokenizer, tmp_path, points, workers
):
    recipe = small_recipe(tokenizer)

    def run(out: Path, log: Path, event: int, seconds: float) -> int:
        status = run_watched(out, log, event, seconds, recipe, workers)
        assert status == (-signal.SIGKILL if event else 0)
        return status

    check_kills(run, demo, tmp_path, points, seed=points)


@pytest.fixture
def launched() -> list[str]:
    """The beginning of a command that two processes run."""
    launch = (
        "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no"
    )
    return launch.split()


@pytest.fixture
def arguments(tokenizer) -> list[str]:
    """The arguments of `icl-moe`, without --out."""
    settings = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer)]
    return ["shards", "build", "demo", *settings, "--workers", "1"]


@pytest.mark.slow
def test_launched_processes_of_which_one_is_killed_go_on_where_they_were(
    demo, launched, arguments, tmp_path, run_command
):
    def run(out: Path, log: Path, event: int, seconds: float) -> int:
        watched = [REPOSITORY / "tests/watched_build.py", out, log, event, seconds]
        command = [*launched, *map(str, watched), *arguments, "--out", str(out)]
        return run_command(command, PYTHONSAFEPATH="1").returncode

    check_kills(run, demo, tmp_path, points=4, seed=0)


@pytest.mark.slow
def test_launched_processes_leave_a_folder_alone_that_another_build_writes(
    launched, arguments, tmp_path, run_command
):
    out = tmp_path / "out"
    with locked(out, "--out"):
        result = run_command([*launched, "-m", "icl_moe", *arguments, "--out", out])
    assert result.returncode != 0
    assert result.stdout.count(f"is writing to {out}; wait until it has ended") == 1
    assert not out.exists()
