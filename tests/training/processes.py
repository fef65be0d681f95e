"""Training as processes that a test can signal: a command in its own session, as a shell or a
cluster starts it, and ranks without a launcher.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from small_run import RANK_VARIABLES, REPOSITORY, SETTINGS

from icl_moe.launcher import free_port

PATIENCE = 240  # seconds; the machine may be busy


def arguments(shards: Path, output: Path, *settings: str) -> list[str]:
    """The arguments that train the small run of these tests."""
    return ["demo", f"data.shards={shards}", f"training.output={output}", *SETTINGS, *settings]


class Session:
    """A running command, whose processes are all in its session."""

    def __init__(self, log: Path, command: list[str], **environment: str) -> None:
        self._log = log
        self.leader = _start(log, command, environment, start_new_session=True)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """All live processes, even if their leader has ended."""
        return [process for process in psutil.process_iter() if self._has(process)]

    def ranks(self) -> list[psutil.Process]:
        """The training processes that already handle signals as requests to stop."""
        launchers = [p for p in self.processes() if "deepspeed.launcher.launch" in _words(p)]
        return [rank for each in launchers for rank in each.children() if _hears(rank)]

    def readers(self) -> list[psutil.Process]:
        return [reader for rank in self.ranks() for reader in rank.children()]

    def wait_for(self, what: Callable[[], object]) -> None:
        wait_for(lambda: what() or self.leader.poll() is not None, lambda: self.log)
        assert what(), self.log

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole process group of the leader."""
        os.killpg(self.leader.pid, number)

    def wait_for_end(self) -> int:
        """Wait until no process is left. Returns the leader's exit code."""
        wait_for(lambda: self.leader.poll() is not None and not self.processes(), lambda: self.log)
        return self.leader.wait()

    def _has(self, process: psutil.Process) -> bool:
        try:
            return (
                os.getsid(process.pid) == self.leader.pid
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


@contextmanager
def session(log: Path, *command: str | Path, **environment: str) -> Iterator[Session]:
    started = Session(log, [str(part) for part in command], **environment)
    try:
        yield started
    finally:
        for process in started.processes():
            process.kill()
        started.leader.wait()


@contextmanager
def two_ranks(
    folder: Path, script: Path, *arguments: str, **environment: str
) -> Iterator[list[subprocess.Popen]]:
    """Two ranks without a launcher, in one process group; `rank-R.log` in the folder is the output
    of rank R.
    """
    port = str(free_port())
    ranks: list[subprocess.Popen] = []
    try:
        for rank in ("0", "1"):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
            ranks.append(
                _start(
                    folder / f"rank-{rank}.log",
                    [sys.executable, str(script), *arguments],
                    {**place, "MASTER_ADDR": "127.0.0.1", **environment},
                    process_group=ranks[0].pid if ranks else 0,
                )
            )
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def wait_for(what: Callable[[], object], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)


def _start(
    log: Path, command: list[str], environment: dict[str, str], **options: object
) -> subprocess.Popen:
    outside = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**outside, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            **options,  # type: ignore[call-overload]
        )


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _hears(process: psutil.Process) -> bool:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
