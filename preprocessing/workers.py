"""Ordered work on several processes."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

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
    one).

    The context, which may be large, reaches the processes by fork and is never copied. At most two
    items a worker are under way or waiting to be taken, so memory stays bounded. An exception of
    `function` is raised here.
    """
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
            window.append(pool.submit(_call, item))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
