"""Where this rank keeps each number of the training state, at ZeRO stages 0 to 3. training_state.py
writes it.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from torch import Tensor
from torch import distributed as dist

from icl_moe.deepspeed_internals import (
    copy_masters_into_model,
    expert_data_parallel_group,
    master_weights,
    optimized_range,
    whole_shape,
)
from icl_moe.model.deepspeed_moe import exported_name, first_expert
from icl_moe.model.router import GATE, keep_full_precision
from icl_moe.model.tensor_parallel import is_split


@dataclass(frozen=True)
class HeldRange:
    """A range of a parameter whose state this rank holds.

    part, parts: which of how many tensor-parallel parts of the parameter; 0 of 1 if it is whole on
    every tensor rank.
    start, length: the range, in the flattened part.
    master, offset: the float32 tensor that the optimizer knows, often of many parameters, and where
    in it the range begins.
    owners: the ranks that hold this part, whole at ZeRO stage 0 and each its own range at the
    others.
    repeated: whether another tensor rank holds the same.
    """

    name: str
    part: int
    parts: int
    start: int
    length: int
    master: Tensor
    offset: int
    owners: Any
    repeated: bool

    def of(self, tensor: Tensor) -> Tensor:
        """This range (length,) of the master tensor, or of an optimizer state of its shape;
        a view.
        """
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def held_ranges(engine: Any) -> Iterator[HeldRange]:
    """All ranges that this rank holds."""
    tensor_rank, tensor_ranks = tensor_place(engine)
    first = first_expert(dist.get_rank(), ep_size(engine), engine.module.settings.experts)
    masters = master_weights(engine)
    for name, parameter in engine.module.named_parameters():
        name = exported_name(name, first)
        part, parts = (tensor_rank, tensor_ranks) if is_split(name) else (0, 1)
        owners, repeated = engine.seq_data_parallel_group, parts == 1 and tensor_rank > 0
        if is_moe_param(parameter):
            # DeepSpeed distributes the copies of an expert over tensor ranks as over other ranks.
            owners, repeated = expert_data_parallel_group(parameter), False
        start, length, master, offset = optimized_range(engine, parameter, masters)
        if length:
            yield HeldRange(name, part, parts, start, length, master, offset, owners, repeated)


def ranges_to_write(engine: Any) -> list[HeldRange]:
    """The ranges that this rank writes: a part of those that it holds, so that each number is
    written once.
    """
    ranges = [r for r in held_ranges(engine) if not r.repeated]
    if engine.zero_optimization_stage():
        return ranges
    by_owners: dict[int, list[HeldRange]] = defaultdict(list)
    for r in ranges:
        by_owners[id(r.owners)].append(r)
    return [share for copies in by_owners.values() for share in _share(copies)]


def _share(copies: list[HeldRange]) -> Iterator[HeldRange]:
    """This rank's share of ranges that all their owners hold completely: an equal part of the
    concatenated parameters.
    """
    owners = copies[0].owners
    rank, ranks = dist.get_rank(owners), dist.get_world_size(owners)
    total, begin = sum(r.length for r in copies), 0
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    for r in copies:
        first, last = max(low - begin, 0), min(high - begin, r.length)
        if first < last:
            yield replace(r, start=first, length=last - first, offset=first)
        begin += r.length


def refresh_gates(engine: Any) -> None:
    """Let gates compute with their current master weights. Every rank calls it.

    DeepSpeed casts every parameter of a bf16 model and partitions the master weights, so each rank
    sends its part of the gates' master weights, which are few, to all others.
    """
    if not engine.bfloat16_enabled():
        return
    gates = {
        name: parameter
        for path, parameter in engine.module.named_parameters()
        if re.search(GATE, name := exported_name(path))
    }
    if not gates:
        return
    shapes = [whole_shape(parameter) for parameter in gates.values()]
    counts = [shape.numel() for shape in shapes]
    # A rank leaves numbers that it does not hold at zero, and each number is held once.
    values = torch.zeros(sum(counts), device=engine.device)
    parts = dict(zip(gates, values.split(counts), strict=True))
    for held in ranges_to_write(engine):
        if held.name in parts:
            parts[held.name][held.start : held.start + held.length] = held.of(held.master)
    dist.all_reduce(values)
    for (name, parameter), shape in zip(gates.items(), shapes, strict=True):
        keep_full_precision(parameter, parts[name].view(shape))


def refresh_model(engine: Any) -> None:
    """Copy the float32 master weights into the model's working weights."""
    copy_masters_into_model(engine)
    refresh_gates(engine)


def ep_size(engine: Any) -> int:
    return max(
        (module.ep_size for module in engine.module.modules() if isinstance(module, MoE)), default=1
    )


def tensor_place(engine: Any) -> tuple[int, int]:
    """This rank's place among the tensor ranks, and their number."""
    mpu = engine.mpu
    return (
        (0, 1)
        if mpu is None
        else (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size())
    )
