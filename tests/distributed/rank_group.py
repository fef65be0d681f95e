"""Real ranks for tests: N processes in one gloo group, which are started once and run one function
after another.
"""

import gc
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp

from icl_moe.launcher import free_port

PATIENCE = 20.0
"""Seconds until the other ranks are killed after one has failed, since they may wait for it
forever.
"""


class RankGroup:
    """`run(function, *args)` calls `function(place, *args)` on every rank and returns their
    results, by rank.

    function: importable by name, since it is pickled. Raises AssertionError with the tracebacks of
    the ranks that failed. The ranks are restarted afterwards, since after a failure they may be at
    different collectives.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results = self._collect()
        failed = [value for _, (ok, value) in sorted(results.items()) if not ok]
        silent = sorted(set(range(self._world)) - results.keys())
        if failed or silent:
            self._kill()
            failed += [f"rank {rank} gave no answer" for rank in silent]
            raise AssertionError("\n".join(failed))
        return [results[rank][1] for rank in range(self._world)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)

    def _start(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._world, port, theirs), daemon=False
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """The answer of each rank: whether it succeeded, and the result or the traceback."""
        results: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self._pipes, range(self._world), strict=True))
        deadline = float("inf")
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=1.0):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = False, f"rank {rank} died"
                if not results[rank][0]:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        return results

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self._processes.clear()


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from icl_moe.training import engine  # noqa: F401
    from icl_moe.training.distributed import process_group

    with process_group() as place:
        gc.collect()
        gc.freeze()  # DeepSpeed collects garbage often; imported modules need not be scanned.
        while (task := pipe.recv()) is not None:
            function, args = task
            try:
                pipe.send((True, function(place, *args)))
            except BaseException:
                pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
