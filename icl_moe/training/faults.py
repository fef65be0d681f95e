"""What can go wrong in a long run, and how the ranks agree on it: signals, losses that are not
finite, ranks that hang.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor
from torch import distributed as dist

from icl_moe.training.distributed import Ranks


def any_rank(flags: Sequence[bool | Tensor], device: torch.device) -> list[bool]:
    """Each flag, true where it is true on any rank; those that are tensors lie on `device`, and the
    host waits for all of them once. Every rank must call it together.
    """
    values = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]


class StopSignal:
    """Whether this process was asked to stop (SIGTERM, as a cluster or `docker stop` sends it, or
    SIGINT).

    Used as a context. The first signal only sets `requested`, and the loop ends at a step that all
    ranks agree on; a second one ends the process as it always would.
    """

    def __enter__(self) -> "StopSignal":
        self.requested = False
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._before[signal.Signals(number)])


class Watchdog:
    """Ends a run in which a rank stands still, and says which one and where.

    Every rank beats at each stage of a micro-step and publishes its count of beats. Where this rank
    has not beaten for `seconds`, the rank with the fewest beats is the one that the others wait
    for. Used as a context; `seconds` None: no watchdog.
    """

    def __init__(self, ranks: Ranks, seconds: float | None) -> None:
        self._ranks = ranks
        self._seconds = seconds
        self._beats = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._store = dist.distributed_c10d._get_default_store()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, step: int, stage: str) -> None:
        """This rank is at `stage` of the step that follows `step` whole ones."""
        self._beats += 1
        self._last = time.monotonic()
        if self._seconds is not None:
            self._store.set(f"beat/{self._ranks.rank}", f"{self._beats}|step {step + 1}, {stage}")

    def on_main(self, step: int, stage: str, work: Callable[[], None]) -> None:
        """Rank 0 does some work while the others wait for it. Every rank must call it together.

        They do not wait in a collective, which would time out, and as long as rank 0 beats they
        beat with it: work may take longer than `seconds`, but a rank 0 that stands still is found.
        """
        done = "work of rank 0 is done"
        self.beat(step, stage)
        if self._ranks.is_main:
            work()
            self._store.set(done, "")
        else:
            self._wait(done, step)
        dist.barrier()
        if self._ranks.is_main:
            self._store.delete_key(done)

    def _wait(self, key: str, step: int) -> None:
        seen = None
        while not self._store.check([key]):
            beat = self._store.get("beat/0") if self._seconds is not None else None
            if beat != seen:
                self.beat(step, "waiting for rank 0")
                seen = beat
            time.sleep(0.1)

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._report()
                # The main thread is in a collective or in foreign code: nothing softer reaches it.
                os._exit(1)

    def _report(self) -> None:
        beats = {}
        for rank in range(self._ranks.world):
            if self._store.check([f"beat/{rank}"]):
                count, where = self._store.get(f"beat/{rank}").decode().split("|")
                beats[rank] = (int(count), where)
        slowest = min(beats, key=lambda rank: beats[rank][0])
        if self._ranks.rank == min(rank for rank in beats if rank != slowest or len(beats) == 1):
            message = (
                f"icl-moe: rank {slowest} stands still at {beats[slowest][1]}; no progress for "
                f"{self._seconds:.0f} s, so the run ends."
            )
            print(message, file=sys.stderr, flush=True)
