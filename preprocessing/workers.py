"""An ordered map on several processes."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from operator import length_hint
from typing import Any, TypeVar

from icl_moe.devices import processors
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
    one), but on at most one process per item and at most `most_workers()`.

    The context, which may be large, reaches the processes by fork and is never copied. At most two
    items per worker are in progress or wait to be consumed, so memory stays bounded. An exception
    of `function` is raised here. Raises InputError if a process was killed.
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
            f"One of {workers} worker processes was killed, which happens when memory runs out; "
            "try a smaller --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def most_workers() -> int:
    """How many processes this machine can use: more than its processors, since some wait for disks
    while others compute.
    """
    return 4 * processors()


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """Defer Ctrl-C until the end of the context. Processes forked within it ignore Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: tuple[Callable[[Any, Any], Any], Any] | None = None


def _adopt(function: Callable[[Any, Any], Any], context: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interruptions for all
    end_with_parent()  # no process outlives a parent that is killed
    _work = (function, context)


def _call(item: Any) -> Any:
    assert _work is not None, "_adopt initialises each worker"
    function, context = _work
    return function(context, item)
