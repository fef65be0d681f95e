"""The stages of the pipeline as commands that a user would type, each run in processes of its own.

Every stage resumes where it was stopped, and does nothing where it is done already, so a sequence
of them can be run again at any time.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from icl_moe.errors import InputError, StoppedError
from icl_moe.launcher import free_port

ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables for several ranks on the cores of one machine: one thread for each rank, since more
would compete for the cores; and the launcher need not look for accelerators.
"""


@dataclass(frozen=True)
class Command:
    """One stage. shown: as a user types it. program: what the interpreter runs; under a launcher
    (`launched`) without the port, which is chosen when it starts, since another run on this machine
    may use the launcher's default. environment: variables that are set unless they are already.
    """

    shown: tuple[str, ...]
    program: tuple[str, ...]
    launched: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.shown)

    def run(self) -> None:
        """Print the command and run it in a process group of its own, which is killed if this
        process is. Raises InputError, which names the command, if it fails; StoppedError when it
        has ended after a signal asked this process to stop.
        """
        print(f"$ {self}", flush=True)
        module, *arguments = self.program
        words = [sys.executable, "-m", module, *arguments]
        if self.launched:
            # As in launch_scripts/pretrain.sh, only the ranks handle signals: a launcher would end
            # before them, or kill those that take long to save.
            words[3:3] = ["--master_port", str(free_port())]
            words = [sys.executable, "-m", "icl_moe.signals", *words]
        code, received = _run_to_its_end(words, {**self.environment, **os.environ})
        if received:
            raise StoppedError(
                received,
                f"{signal.Signals(received).name}: stopped during `{self}`; the same command as "
                "before resumes from there.",
            )
        if code:
            raise InputError(
                f"`{self}` ended with exit code {code}. Once its cause is mended, the same command "
                "as before resumes from there."
            )


def _run_to_its_end(words: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """The exit code of a command, and the first signal that asked this process to stop meanwhile,
    or 0. Each was passed on to all processes of the command. What suspends this process, such as
    Ctrl-Z, suspends these too.
    """
    received: list[int] = []
    group: list[int] = []

    def pass_on(number: int, _: FrameType | None = None) -> None:
        received.append(number)
        # A stage would not end in its own way at SIGHUP, which tells that the terminal has gone.
        asks = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for leader in group:
            _signal_group(leader, asks)

    def suspend(number: int, _: FrameType | None) -> None:
        for leader in group:
            _signal_group(leader, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for leader in group:
            _signal_group(leader, signal.SIGCONT)

    handlers = {**dict.fromkeys(_ASKING, pass_on), signal.SIGTSTP: suspend}
    before = {}
    if threading.current_thread() is threading.main_thread():  # No other can set handlers.
        before = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN  # As nohup has it.
        }
    try:
        guarded = [sys.executable, "-m", "icl_moe.guard", str(os.getpid()), *words]
        command = subprocess.Popen(guarded, env=environment, process_group=0)
        group.append(command.pid)
        for number in received[:1]:  # It came before there was a group.
            pass_on(number)
        # Not one long wait, which only a signal to this very thread interrupts: the kernel gives a
        # signal to any other thread, such as a worker of BLAS, while this one is being continued.
        while (code := command.poll()) is None:
            time.sleep(_LOOK)
        if code < 0:  # The guard was killed, so nobody else ends its group.
            _signal_group(command.pid, signal.SIGKILL)
        group.clear()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, next(iter(received), 0)


def _signal_group(leader: int, number: int) -> None:
    """Send a signal to a process group that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


_LOOK = 0.05
"""Seconds between two looks at whether a command has ended, and at signals."""

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def verb(*arguments: str | Path, environment: Mapping[str, str] = ON_CPU) -> Command:
    """One verb of the command line."""
    words = tuple(map(str, arguments))
    return Command(("icl-moe", *words), ("icl_moe", *words), environment=environment)


def launch(ranks: int | None, *arguments: str, environment: Mapping[str, str] = ON_CPU) -> Command:
    """Training under the deepspeed launcher on `ranks` devices of this machine, or on all that the
    launcher finds (None). arguments: the recipe and its overrides.
    """
    number = () if ranks is None else ("--num_gpus", str(ranks))
    return Command(
        ("deepspeed", *number, "launch_scripts/pretrain.sh", *arguments),
        ("deepspeed.launcher.runner", *number, "--module", "icl_moe.training", *arguments),
        launched=True,
        environment=environment,
    )
