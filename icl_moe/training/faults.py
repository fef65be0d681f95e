"""What can go wrong in a long run, and how the ranks agree on it: requests to stop, losses that are
not finite, ranks that hang.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from icl_moe.messages import say
from icl_moe.signals import stop_requested
from icl_moe.training.distributed import Place

_BEFORE = "before the first step"
_STORE_PATIENCE = 5.0
"""Seconds within which the store, which rank 0 keeps, must answer a watchdog."""


def any_rank(flags: Sequence[bool | Tensor], device: torch.device) -> list[bool]:
    """For each flag, whether it is true on any rank. Flags that are tensors lie on `device`, and
    the host waits for all of them once. All ranks must call this together.
    """
    values = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]


def agreed_to_stop(place: Place) -> bool:
    """Whether any rank was asked to stop. All ranks must call this together."""
    return any_rank([stop_requested()], place.device)[0]


class Watchdog:
    """Ends a run in which a rank makes no progress, and reports which rank and where.

    Every rank beats at each stage of a micro-step and publishes its number of beats. If this rank
    has not beaten for `seconds`, the rank with the fewest beats is the one that the others wait
    for. Time in which the process was suspended does not count. Use it as a context; with `seconds`
    None there is no watchdog.
    """

    def __init__(self, place: Place, seconds: float | None) -> None:
        self._place = place
        self._seconds = seconds
        self._beats = 0
        self._last = time.monotonic()
        self._where = _BEFORE
        self._ended = threading.Event()
        self._store = dist.distributed_c10d._get_default_store()

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, step: int, stage: str) -> None:
        """Record that this rank is at `stage` of the step after `step` completed ones."""
        self._beats += 1
        self._last = time.monotonic()
        self._where = f"at step {step + 1}, {stage}"
        if self._seconds is not None:
            self._store.set(f"beat/{self._place.rank}", f"{self._beats}|{self._where}")

    def on_main(self, step: int, stage: str, work: Callable[[], None]) -> None:
        """Let rank 0 do some work while the others wait for it. All ranks must call this together.

        They do not wait in a collective, which would time out. As long as rank 0 beats, they beat
        with it, so the work may take longer than `seconds`, but a rank 0 that hangs is detected.
        """
        done = "work of rank 0 is done"
        self.beat(step, stage)
        if self._place.is_main:
            work()
            self._store.set(done, "")
        else:
            self._wait(done, step)
        dist.barrier()
        if self._place.is_main:
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
        pause, awake = min(1.0, self._seconds / 4), time.monotonic()
        while not self._ended.wait(pause):
            slept, awake = time.monotonic() - awake, time.monotonic()
            if slept > pause + self._seconds / 4:
                # This process was suspended, as SLURM does with jobs: nothing of it hung.
                self._last = awake
            if time.monotonic() - self._last > self._seconds:
                # The main thread is in a collective or in foreign code, and the store may be gone
                # or hang with rank 0: nothing may prevent this process from ending.
                reported = threading.Event()
                report = threading.Thread(target=self._report, args=(reported,), daemon=True)
                report.start()
                report.join(_STORE_PATIENCE)
                if not reported.is_set():
                    self._say(
                        f"rank {self._place.rank} hangs {self._where}, and rank 0, which "
                        "holds the store of all ranks, does not answer"
                    )
                os._exit(1)

    def _report(self, reported: threading.Event) -> None:
        """Name the rank with the fewest beats, once for all ranks."""
        with contextlib.suppress(dist.DistError):
            beats = [self._beats_of(rank) for rank in range(self._place.world)]
            slowest = min(range(self._place.world), key=lambda rank: beats[rank][0])
            if self._store.add("hang reported", 1) == 1:
                self._say(f"rank {slowest} hangs {beats[slowest][1]}")
            reported.set()

    def _beats_of(self, rank: int) -> tuple[int, str]:
        if not self._store.check([f"beat/{rank}"]):
            return 0, _BEFORE
        count, where = self._store.get(f"beat/{rank}").decode().split("|")
        return int(count), where

    def _say(self, what: str) -> None:
        seconds = f"{self._seconds:.0f} s"
        say(f"{what}; no progress for {seconds}, so the run ends.")
