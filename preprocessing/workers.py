"""Ordered work on several processes."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from operator import length_hint
from typing import Any, TypeVar

from icl_moe.errors import InputError
from icl_moe.signals import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
Context = TypeVar("Context")


def ordered_map(
    function: Callable[[Context, Item], Result],
    context: Context,
    items: Iterable[Item],
    workers: int,
) -> Iterator[Result]:
    """`function(context, item)` for each item, in order, on `workers` processes (0 or 1: in this
    one), but never more than there are items, nor than `most_workers()`.

    The context, which may be large, reaches the processes by fork and is never copied. At most two
    items a worker are under way or waiting to be taken, so memory stays bounded. An exception of
    `function` is raised here. Raises InputError where a process was killed.
    """
    workers = min(workers, length_hint(items, workers), most_workers())
    if workers <= 1:
        yield from (function(context, item) for item in items)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        initializer=_adopt,
        initargs=(function, context),
    )
    try:
        window: deque[Future[Result]] = deque()
        for item in items:
            with _without_interruption():  # The first item starts the processes, which inherit it.
                window.append(pool.submit(_call, item))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"One of {workers} worker processes was killed, as happens where memory is short; try "
            "--workers with a smaller number."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def most_workers() -> int:
    """How many processes this machine has use for: some may wait for disks while others compute."""
    return 4 * len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """A Ctrl-C meanwhile comes afterwards. A process that is forked meanwhile gets none."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: tuple[Callable[[Any, Any], Any], Any] | None = None


def _adopt(function: Callable[[Any, Any], Any], context: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers an interruption, for all
    end_with_parent()  # a parent that is killed leaves no process waiting for ever
    _work = (function, context)


def _call(item: Any) -> Any:
    assert _work is not None, "a worker starts with _adopt"
    function, context = _work
    return function(context, item)
