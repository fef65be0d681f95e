"""The processes that share the work of a stage without DeepSpeed: building shards, training a
tokenizer, or evaluating.

Separate from training/distributed.py because those stages must not wait for the import of
DeepSpeed.
"""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from icl_moe.devices import Device, find_device
from icl_moe.errors import InputError
from icl_moe.launcher import launched_ranks, ranks_of_this_machine

_PATIENCE = timedelta(days=14)
"""How long a process waits for the others. By torch's default of minutes a build would end because
one of its machines is some percent slower, or because the first process draws scenes or plans for
the others. A process that ends is noticed by its launcher, which ends the others.
"""


def join_processes(device: Device | None = None) -> PartialState:
    """The processes that `accelerate launch` or torchrun started, or this one alone. Must be called
    before anything else of accelerate.

    device: where each process computes, by default on a GPU if there is one. Raises InputError if
    this machine has no such device, or if several processes would share a numbered one.

    Without CUDA, accelerate joins torchrun's processes only if told that they use CPUs. Otherwise
    each would do all of the work.
    """
    launched = launched_ranks() > 1
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


def on_first(process: PartialState, function: Callable[[], str]) -> str:
    """What `function` returns in the first process, in all of them. If it raises InputError there,
    this raises that error in all of them.
    """
    if process.num_processes == 1:
        return function()
    answer: list[str | None] = [None, None]
    error = None
    if process.is_main_process:
        try:
            answer[0] = function()
        except InputError as found:
            error, answer[1] = found, str(found)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise error or InputError(answer[1])
    return str(answer[0])


def share_of(workers: int) -> int:
    """This process's share of the worker processes of its machine; at least one, if there are
    any.
    """
    return min(workers, max(1, workers // ranks_of_this_machine()))
