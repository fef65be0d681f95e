"""Stages as processes: a signal to the command that runs them reaches all of their processes, and
none outlives it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_STAGE = """
import multiprocessing, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[-1])

def stop(number, _):
    time.sleep(0.5)  # It saves.
    (folder / f"saved-{signal.Signals(number).name}").touch()
    sys.exit(0)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
context = multiprocessing.get_context("fork")
at_work = context.Event()

def work():
    at_work.set()
    time.sleep(60)

worker = context.Process(target=work, daemon=True)
worker.start()
at_work.wait()  # Until then, a signal's SystemExit may be lost in what Python does after a fork.
pid = multiprocessing.current_process().pid
(folder / "unfinished").write_text(f"{pid} {worker.pid}")
(folder / "unfinished").rename(folder / "processes")
(folder / "blocked").write_text(str(signal.SIGTERM in blocked))
time.sleep(60)
"""

_COMMAND = """
import signal, sys, threading, time

if sys.argv[3] != "before":  # As in a terminal, even if what runs the tests ignores these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if sys.argv[3] == "threads":  # The kernel gives signals to the other thread.
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

from icl_moe.cli import main
from icl_moe.commands import training
from icl_moe.stages import Command

def run(options):
    Command(("icl-moe", "fake"), ("fake_stage", sys.argv[1]), launched=sys.argv[2] == "True").run()

training._demo = run
sys.exit(main(["demo", "--out", sys.argv[1]]))
"""


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts a command with a stage in this folder; returns it when the stage is at work."""
    (tmp_path / "fake_stage.py").write_text(_STAGE)
    started = []

    def start(launched: bool = False, *before: str, signals: str = "asked") -> subprocess.Popen:
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
        command = subprocess.Popen(
            [
                *before,
                *(sys.executable, "-c", _COMMAND, str(tmp_path), str(launched), signals),
            ],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(command)
        deadline = time.monotonic() + 60
        while not (tmp_path / "blocked").is_file():
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return command

    yield start
    for command in started:
        command.kill()
    for process in _live(tmp_path):
        process.kill()


def _live(folder: Path) -> list[psutil.Process]:
    """Those of the stage's processes that have not ended."""
    file = folder / "processes"
    pids = map(int, file.read_text().split()) if file.is_file() else ()
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize(
    ("number", "arrives_as"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_stage_saves_before_the_command_that_was_asked_to_stop_ends(
    start, tmp_path, number, arrives_as, launched
):
    command = start(launched)
    command.send_signal(number)
    _, said = command.communicate(timeout=30)
    assert (tmp_path / f"saved-{arrives_as}").is_file()
    assert command.returncode == 128 + number
    assert said == (
        f"icl-moe: {number.name}: stopped during `icl-moe fake`; the same command as before "
        "resumes from there.\n"
    )
    assert not _live(tmp_path)
    assert (tmp_path / "blocked").read_text() == str(launched), "a launcher hears no signals"


def test_a_signal_that_another_thread_receives_reaches_the_stage(start, tmp_path):
    command = start(signals="threads")
    command.terminate()
    assert command.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "saved-SIGTERM").is_file()


def test_no_process_of_a_stage_outlives_a_command_that_is_killed(start, tmp_path):
    command = start()
    assert len(_live(tmp_path)) == 2
    command.kill()
    command.wait()
    deadline = time.monotonic() + 10
    while _live(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _live(tmp_path)
    assert not list(tmp_path.glob("saved-*"))


def test_a_stage_is_suspended_and_goes_on_with_its_command(start, tmp_path):
    command = start()
    command.send_signal(signal.SIGTSTP)
    os.waitpid(command.pid, os.WUNTRACED)
    deadline = time.monotonic() + 30
    while {process.status() for process in _live(tmp_path)} != {psutil.STATUS_STOPPED}:
        assert time.monotonic() < deadline, "the stage runs on"
        time.sleep(0.02)
    command.send_signal(signal.SIGCONT)
    command.terminate()
    assert command.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "saved-SIGTERM").is_file()


def test_no_process_outlives_a_killed_guard(start, tmp_path):
    command = start()
    (guard,) = psutil.Process(command.pid).children()
    guard.kill()
    assert command.wait(timeout=30) == 2
    deadline = time.monotonic() + 30
    while _live(tmp_path):
        assert time.monotonic() < deadline, "the stage runs on"
        time.sleep(0.02)


def test_a_command_without_a_terminal_does_not_stop_when_that_goes(start, tmp_path):
    command = start(False, "nohup", signals="before")
    command.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert command.poll() is None and len(_live(tmp_path)) == 2
