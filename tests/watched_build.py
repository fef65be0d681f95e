"""Logs what a build does to the files of its folder, and kills it at a chosen point.

    python tests/watched_build.py FOLDER LOG EVENT SECONDS ARGUMENT ...

runs `icl-moe ARGUMENT ...`, in chunks of one batch, and kills itself SECONDS after the EVENT-th
thing (0: never) that it, its workers or the ranks beside it do to a file in FOLDER.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from icl_moe.cli import main
from preprocessing import quantize
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe

_LINE = 160
"""Bytes of a line of the log, all the same, so that its size tells the number of lines."""

_WRITES = os.O_WRONLY | os.O_RDWR


def watch(folder: Path, log: Path, event: int = 0, seconds: float = 0.0) -> None:
    """Watch this process and those that it forks from now on. Kills this one."""
    victim = os.getpid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, arguments: tuple[Any, ...]) -> None:
        path = _written(kind, arguments)
        if path is None or not path.startswith(f"{folder}/") or "/images/" in path:
            return  # The drawn scenes are one event, or kills would meet little else.
        os.write(file, f"{kind} {path[len(str(folder)) + 1 :]}".encode().ljust(_LINE - 1) + b"\n")
        if event and os.fstat(file).st_size // _LINE == event:
            if seconds:
                threading.Timer(seconds, os.kill, (victim, signal.SIGKILL)).start()
            else:
                os.kill(victim, signal.SIGKILL)

    sys.addaudithook(note)


def run_watched(
    folder: Path, log: Path, event: int, seconds: float, recipe: DataRecipe, workers: int
) -> int:
    """Build `recipe` in a process of its own, watched, in chunks of one batch. Returns the exit
    code, which is negative for a signal.
    """
    # The server imports torch once for all builds, and has no threads that a fork would tear.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preprocessing.build"])
    of_build = (folder, log, event, seconds, recipe, workers)
    process = context.Process(target=_build_watched, args=of_build)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _build_watched(
    folder: Path, log: Path, event: int, seconds: float, recipe: DataRecipe, workers: int
) -> None:
    torch.set_num_threads(1)
    quantize.CHUNK = quantize.BATCH
    watch(folder, log, event, seconds)
    build_shards(recipe, folder, workers)
    time.sleep(seconds)  # A late kill comes in any case.


def events_in(log: Path) -> list[str]:
    """The lines of a log, such as "os.rename segmentation-000000.tar", the file that appeared."""
    return [line.strip() for line in log.read_text().splitlines()]


def _written(kind: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an event of the interpreter changes; None if it changes none."""
    if kind == "os.rename":
        return str(arguments[1])
    if kind in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        return str(arguments[0])
    if kind == "open" and isinstance(arguments[0], str) and arguments[2] & _WRITES:
        return arguments[0]
    return None


if __name__ == "__main__":
    quantize.CHUNK = quantize.BATCH
    watch(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    sys.exit(main(sys.argv[5:]))
