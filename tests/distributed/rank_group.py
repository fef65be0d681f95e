"""Real ranks for tests: N processes in one gloo group, started once and given one function after
another.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


class RankGroup:
    """`run(function, *args)` calls `function(ranks, *args)` on every rank and returns their
    results, by rank.

    function: importable by name, since it is pickled. Raises AssertionError with the traceback of
    the first rank that failed.
    """

    def __init__(self, world: int, port: int) -> None:
        context = mp.get_context("spawn")
        self._tasks = [context.SimpleQueue() for _ in range(world)]
        self._results = [context.SimpleQueue() for _ in range(world)]
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, world, port, self._tasks[rank], self._results[rank]),
                daemon=False,
            )
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for queue in self._tasks:
            queue.put((function, args))
        results = [queue.get() for queue in self._results]
        for ok, value in results:
            assert ok, value
        return [value for _, value in results]

    def close(self) -> None:
        for queue in self._tasks:
            queue.put(None)
        for process in self._processes:
            process.join(30)


def _serve(rank: int, world: int, port: int, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from icl_moe.training.distributed import process_group

    with process_group() as ranks:
        while (task := tasks.get()) is not None:
            function, args = task
            try:
                results.put((True, function(ranks, *args)))
            except BaseException:
                results.put((False, f"rank {rank}:\n{traceback.format_exc()}"))
