"""The process group of a run: one process alone, or one of the ranks that a launcher started."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.utils import logger
from torch import distributed as dist

from icl_moe.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's place: its rank among `world`, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_rank() -> int:
    """This process's rank before any group exists; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the launcher's ranks (environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), or be the only one."""
    logger.setLevel("WARNING")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    # A collective for inference on CPUs that would otherwise be compiled here, for half a minute, and needs a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"The ranks cannot meet at {address} ({error}); is another run there? Give --master_port to the launcher."
        ) from error
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Without this, ranks now and then die at exit. After an exception it is not tried: the others may not be listening.
    dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
