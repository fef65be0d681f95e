"""A command as the leader of a session and process group of its own, as a shell or a cluster starts
it, and signals to all of it.
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
from conftest import RANK_VARIABLES, REPOSITORY

PATIENCE = 240  # Seconds; the machine may be busy.


class Group:
    """A running command. `log` is all that it printed; `ranks` are the processes that train."""

    def __init__(self, log: Path, *command: str | Path, **environment: str) -> None:
        self._log = log
        outside = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with log.open("w") as file:
            self.leader = subprocess.Popen(
                [str(part) for part in command],
                cwd=REPOSITORY,
                env={**outside, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """All of its session that live; the leader's children stay in it when the leader is
        gone.
        """
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.leader.pid and (
                    process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        launchers = [p for p in self.processes() if "deepspeed.launcher.launch" in _words(p)]
        return [rank for launcher in launchers for rank in launcher.children()]

    def readers(self) -> list[psutil.Process]:
        return [reader for rank in self.ranks() for reader in rank.children()]

    def wait_for(self, what: Callable[[], object]) -> None:
        self._wait(lambda: what() or self.leader.poll() is not None)
        assert what(), self.log

    def wait_for_line(self, text: str) -> None:
        self.wait_for(lambda: text in self.log)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.leader.pid, number)

    def wait_for_end(self) -> int:
        """Until no process of it is left; the leader's exit code."""
        self._wait(lambda: self.leader.poll() is not None and not self.processes())
        return self.leader.wait()

    def kill(self) -> None:
        for process in self.processes():
            process.kill()
        self.leader.wait()

    def _wait(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)


@contextmanager
def started(log: Path, *command: str | Path, **environment: str) -> Iterator[Group]:
    group = Group(log, *command, **environment)
    try:
        yield group
    finally:
        group.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
