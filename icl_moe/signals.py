"""Requests to stop a run, and child processes that end with their parent.

SIGTERM, which a cluster or `docker stop` sends, and SIGINT, which Ctrl-C sends, ask a run to stop.
One request arrives as several signals: if a whole process group receives a signal, each rank gets
it from there and once more from its launcher, which passes on what it received itself. A second
request ends the process at once.

This module is separate from training/ because it must be active before torch is imported, which
takes seconds.

`python -m icl_moe.signals COMMAND ...` runs a command and keeps these signals from it and from all
processes that it starts, until those processes unblock them. The launch scripts start the launcher
in this way; otherwise it would pass the signals on to its ranks, kill those that remain after 30
seconds, and exit with 1.
"""

import contextlib
import ctypes
import enum
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from icl_moe.launcher import launched_ranks
from icl_moe.messages import say, say_on_main

STOPPING = (signal.SIGINT, signal.SIGTERM)

_ONE_REQUEST = 2.5
"""Seconds after the first signal of a request within which all others belong to it."""

_MEETING = 3.0
"""Seconds that a process which was asked to stop waits for ranks that are not connected yet."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Phase(enum.Enum):
    """How far a run has come. Before its ranks are connected nothing is lost if one of them ends;
    afterwards they have to agree on ending.
    """

    BEFORE = enum.auto()
    MEETING = enum.auto()
    TOGETHER = enum.auto()


class _Requests:
    """The requests to stop that reached this process."""

    def __init__(self) -> None:
        self.launcher: int | None = None
        self.phase = _Phase.BEFORE
        self.first: float | None = None
        self._listener: threading.Thread | None = None
        self._ended = threading.Event()

    def note(self, number: int, sender: int | None = None) -> None:
        """Count a signal; `sender` is the process that sent it, if that is known."""
        now = time.monotonic()
        if self.phase is _Phase.BEFORE:
            say_on_main(f"{_name(number)}: stopped before the run began.")
            self._end(number)
        elif self.first is None:
            self.first = now
            say_on_main(
                f"{_name(number)}: asked to stop; the run ends as soon as its ranks agree. A "
                "second signal, some seconds from now, ends it at once."
            )
        # The launcher signals its ranks one after another, each when the one before has ended: its
        # signal may be late, and is never a request of its own.
        elif now - self.first > _ONE_REQUEST and (sender is None or sender != self.launcher):
            say_on_main("a second signal: the run ends at once.")
            os._exit(128 + number)

    def listen(self) -> None:
        """From now on a separate thread receives the signals: it knows who sent them, and it runs
        even while the main thread is in foreign code, such as a collective.
        """
        # Threads that start from here on inherit the mask, so that no other is given a signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self._ended.clear()
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()

    @property
    def listens(self) -> bool:
        return self._listener is not None

    def stop_listening(self) -> None:
        assert self._listener is not None
        self._ended.set()
        self._listener.join()
        self._listener = self.first = None
        self.phase = _Phase.BEFORE
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _listen(self) -> None:
        meeting_since = 0.0
        while not self._ended.is_set():
            received = signal.sigtimedwait(STOPPING, 0.5)
            # A process that was suspended meanwhile may get a structure that nothing has filled: in
            # CPython, a call that is interrupted after its time was up.
            if received is not None and received.si_signo in STOPPING:
                self.note(received.si_signo, received.si_pid)
            if self.phase is not _Phase.MEETING or self.first is None:
                meeting_since = time.monotonic()
            elif time.monotonic() - meeting_since > _MEETING:
                say("stopped before the run began, while it waited for the other ranks.")
                self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        """End before the ranks are connected. The launcher ignores a rank that ends with 0, and the
        others would wait for this one, so it ends with an error code if there are others.
        """
        os._exit(0 if launched_ranks() == 1 else 128 + number)


_requests = _Requests()


def stop_requested() -> bool:
    """Whether this process was asked to stop since its ranks have met."""
    return _requests.first is not None


def before_the_run() -> bool:
    """Whether the ranks are not connected yet, so that a signal ends this process at once."""
    return _requests.phase is _Phase.BEFORE


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Within this context this process waits for the other ranks. Before it, a request to stop ends
    the process at once; from here on the ranks have to agree, unless the others do not appear.
    """
    _requests.phase = _Phase.MEETING
    yield
    _requests.phase = _Phase.TOGETHER


def is_program() -> bool:
    """Whether this is a rank's own process. A reader of shards that multiprocessing starts as a new
    program ("spawn", "forkserver") first runs the program of its rank, under the name __mp_main__:
    it must neither train nor listen to signals.
    """
    return getattr(sys.modules.get("__mp_main__"), "__name__", None) != "__mp_main__"


def hear() -> None:
    """From now on a signal is a request to stop, and nothing more, until the process ends.

    This is for the first line of a program: code that runs before `listen` need not know about
    signals. Signals that our launch scripts block for this process are unblocked, and a signal that
    was sent before this process existed counts.
    """
    for number in STOPPING:
        signal.signal(number, _handle)
    _requests.launcher = os.getppid() if "RANK" in os.environ else None
    held = _held_back()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    if held is not None:
        _requests.note(held)


def listen() -> None:
    """As `hear`, but with a separate thread that listens until the process ends."""
    if not _requests.listens:
        hear()
        _requests.listen()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within this context signals are requests to stop; afterwards their former effect is back."""
    if _requests.listens:
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    listen()
    try:
        yield
    finally:
        _requests.stop_listening()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Have this process, a child of multiprocessing, killed when its parent dies in any way."""
    _signal_at_parents_death(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # It may have died before. Siblings that were forked hold the pipe that `is_alive` looks at.
    forked = isinstance(multiprocessing.current_process(), multiprocessing.context.ForkProcess)
    if parent is not None and (os.getppid() != parent.pid if forked else not parent.is_alive()):
        os._exit(1)


def signal_at_death_of(parent: int, number: signal.Signals) -> None:
    """Have this process, a child of the process `parent`, receive a signal when that dies in any
    way; on Linux alone.
    """
    _signal_at_parents_death(number)
    if os.getppid() != parent:  # It has died before.
        os.kill(os.getpid(), number)


def _signal_at_parents_death(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def obey_parent_alone() -> None:
    """Make this process, a child of multiprocessing, ignore the signals of others and end with its
    parent, or when its parent tells it to.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_await_parent, name="signals", daemon=True).start()
    end_with_parent()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo(STOPPING).si_pid != parent.pid:
        pass
    os._exit(0)


def _handle(number: int, _: FrameType | None) -> None:
    _requests.note(number)


def _held_back() -> int | None:
    """A signal that is pending in a process above this one which blocks it: `python -m
    icl_moe.signals`, or a launcher that it started. A signal that arrived before there were ranks
    is pending there.
    """
    pid = os.getppid()
    with contextlib.suppress(OSError, KeyError, ValueError):
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            waiting, blocked = int(status["ShdPnd"], 16), int(status["SigBlk"], 16)
            for number in STOPPING:
                if waiting >> (number - 1) & 1:
                    return number
            if not blocked >> (signal.SIGTERM - 1) & 1:
                return None
            pid = int(status["PPid"])
    return None


def _name(number: int) -> str:
    return signal.Signals(number).name


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    os.execvp(sys.argv[1], sys.argv[1:])
