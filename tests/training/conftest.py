import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import toy_tokenizer
from small_run import SETTINGS, launcher

MODULE = ("--module", "icl_moe.training")


@pytest.fixture(scope="session")
def command(run_command: Callable) -> Callable:
    return lambda *parts, **environment: run_command(parts, **environment)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, command: Callable) -> Path:
    """Shards of 30 drawn scenes, encoded by a tokenizer with random weights."""
    folder = tmp_path_factory.mktemp("shards")
    settings = toy_tokenizer.recipe_settings(toy_tokenizer.save_toy_tokenizer(folder / "tokenizer"))
    build = (
        "shards",
        "build",
        "demo",
        "synthetic.images=30",
        "vocabulary.mask=true",
        *settings,
        "--out",
        folder / "shards",
        "--workers",
        "1",
    )
    done = command(sys.executable, "-m", "icl_moe", *build)
    assert done.returncode == 0, done.stdout
    return folder / "shards"


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[int], AbstractContextManager[Path]]:
    """A folder on a separate disk of the given size in MiB."""

    @contextmanager
    def mount(mebibytes: int) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", disk]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
        try:
            yield disk
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    return mount


@pytest.fixture(scope="session")
def train(command: Callable, shards: Path) -> Callable:
    """Trains on two ranks. Returns what was printed."""

    def run(
        output: Path,
        *settings: str,
        expect: int | None = 0,
        script: tuple[str, ...] = MODULE,
        **environment: str,
    ) -> str:
        """expect: the exit code, or None for any except 0."""
        arguments = (
            "demo",
            f"data.shards={shards}",
            f"training.output={output}",
            *SETTINGS,
            *settings,
        )
        done = command(*launcher(), *script, *arguments, **environment)
        assert (done.returncode == expect) if expect is not None else (done.returncode != 0), (
            done.stdout
        )
        return done.stdout

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, train: Callable) -> Path:
    """The folder of an undisturbed run of six steps."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(output, "training.steps=6", "training.save_every=2")
    return output
