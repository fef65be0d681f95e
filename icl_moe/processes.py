"""The processes that share the work of the stages without DeepSpeed (building shards, training a
tokenizer).

Separate from training/distributed.py because those stages must not wait for the import of
DeepSpeed.
"""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from icl_moe.devices import Device, find_device
from icl_moe.errors import InputError

_PATIENCE = timedelta(days=14)
"""How long a process waits for the others. By torch's default of minutes a build would end because
one of its machines is some percent slower, or because the first process draws scenes for the
others. A process that ends is noticed by its launcher, which ends the others.
"""


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
        return PartialState(cpu=launched and not torch.cuda.is_available(), timeout=_PATIENCE)
    place = find_device(device)
    if place.type == "cuda" and place.index is not None:
        if launched:
            raise InputError(
                f"The device {place} would be shared by all processes; cuda gives each process "
                "its own."
            )
        torch.cuda.set_device(place)
    return PartialState(cpu=place.type == "cpu", timeout=_PATIENCE)
