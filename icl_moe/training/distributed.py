"""The process group of a run: one process alone, or one of the ranks that a launcher started."""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.utils import logger
from torch import distributed as dist

from icl_moe.deepspeed_internals import leave_out_shared_memory_collective
from icl_moe.errors import InputError, RankError
from icl_moe.launcher import free_port, launched_ranks
from icl_moe.messages import say
from icl_moe.signals import meeting, stop_requested

_REASON = "the reason that a rank gave for its end"

_LOST = re.compile("Connection (closed|reset) by|Broken pipe|ncclRemoteError")
"""The errors of gloo and NCCL when another rank has ended."""

_LAUNCHER_NOTICES = 5.0
"""Seconds within which the launcher notices that a rank has ended; it checks every second."""


@dataclass(frozen=True)
class Place:
    """The place of this process: its rank among `world` ranks, and the device that it uses."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class ModelParallelUnit:
    """The `mpu` interface that DeepSpeed needs, implemented with megatron-core, which uses other
    names for some of it.

    Tensor ranks are neighbours (tp 2 on four ranks: 0 1 | 2 3), and ranks at the same place in
    them form a data-parallel group (0 2 | 1 3).
    """

    def __init__(self, tp_size: int) -> None:
        # On every rank it warns about optional packages that are missing.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tp_size)
        assert parallel_state.get_tensor_model_parallel_world_size() == tp_size, (
            "a process can have only one layout of tensor ranks"
        )
        self.get_tensor_model_parallel_rank = self.get_model_parallel_rank = (
            parallel_state.get_tensor_model_parallel_rank
        )
        self.get_tensor_model_parallel_group = self.get_model_parallel_group = (
            parallel_state.get_tensor_model_parallel_group
        )
        self.get_tensor_model_parallel_world_size = (
            parallel_state.get_tensor_model_parallel_world_size
        )
        self.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_data_parallel_rank = parallel_state.get_data_parallel_rank
        self.get_data_parallel_group = parallel_state.get_data_parallel_group
        self.get_data_parallel_world_size = parallel_state.get_data_parallel_world_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())


@contextlib.contextmanager
def process_group() -> Iterator[Place]:
    """Join the launcher's ranks (environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or
    be the only one. If the process is in a group already, that group is used and not closed.

    An InputError within the context leaves it as a RankError on the first rank that has one,
    because all ranks may find the same error, or only one of them, and one must report it. The
    others end with exit code 2 and without a message, even if a collective fails because that rank
    has ended. If a rank ended for another reason, the others report that they lost it, without a
    traceback.
    """
    logger.setLevel("WARNING")
    with _launched_or_alone(), _joined() as place:
        yield place


@contextlib.contextmanager
def _launched_or_alone() -> Iterator[None]:
    """Within this context the launcher's variables are set, even without a launcher. They are
    removed afterwards, so that commands which this process starts do not act as ranks.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if launched_ranks() == 1:
        alone["MASTER_PORT"] = str(free_port())
    missing = {name: value for name, value in alone.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _joined() -> Iterator[Place]:
    leave_out_shared_memory_collective()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    is_ours = not dist.is_initialized()
    try:
        with meeting():
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
            )
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"The ranks cannot connect at {address} ({error}); is another run there? Give "
            "--master_port to the launcher."
        ) from error
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    except InputError as error:
        if not is_first(_REASON):
            raise SystemExit(2) from error
        raise RankError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, dist.DistNetworkError) or _LOST.search(str(error)):
            _end_after_another(error)
        raise
    # Without this, ranks sometimes crash at exit. After an exception it is not tried, because the
    # other ranks may not take part.
    if is_ours:
        dist.destroy_process_group()


def is_first(name: str) -> bool:
    """Whether this rank is the first to ask."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add(name, 1) == 1)
    except dist.DistError:
        return False  # The rank that keeps the store has reported and ended.


def _end_after_another(error: RuntimeError) -> None:
    """End this rank, which has lost another one."""
    with contextlib.suppress(dist.DistError):
        if dist.distributed_c10d._get_default_store().check([_REASON]):
            raise SystemExit(2) from error
    say(
        f"rank {dist.get_rank()} has lost the connection to another rank and ends "
        f"({str(error).splitlines()[0]})."
    )
    # The launcher signals all ranks when one has ended, and exits with the code of the first one
    # that it finds, which should be the one that ended by itself.
    deadline = time.monotonic() + _LAUNCHER_NOTICES
    while not stop_requested() and time.monotonic() < deadline:
        time.sleep(0.1)
    raise SystemExit(1) from error


def generators_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within this context random numbers may be drawn; afterwards the generators are restored."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
