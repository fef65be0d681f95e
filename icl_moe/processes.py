"""The processes that share the work of the stages without DeepSpeed (building shards, training a
tokenizer).

Separate from training/distributed.py because those stages must not wait for the import of
DeepSpeed.
"""

import os

import torch
from accelerate import PartialState

from icl_moe.devices import Device, find_device
from icl_moe.errors import InputError


def join_processes(device: Device | None = None) -> PartialState:
    """The processes that `accelerate launch` or torchrun started, or this one alone. Must be called
    before anything else of accelerate.

    device: where each process computes, by default on a GPU if there is one. Raises InputError if
    this machine has no such device, or if several processes would share a numbered one.

    Without CUDA, accelerate joins torchrun's processes only if told that they use CPUs. Otherwise
    each would do all of the work.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device is None:
        return PartialState(cpu=launched and not torch.cuda.is_available())
    place = find_device(device)
    if place.type == "cuda" and place.index is not None:
        if launched:
            raise InputError(
                f"The device {place} would be shared by all processes; cuda gives each process "
                "its own."
            )
        torch.cuda.set_device(place)
    return PartialState(cpu=place.type == "cpu")
