"""The global gradient norm: computed here if the engine does not compute it, and the marks that the
engine needs to compute it correctly.

At ZeRO stage 0 in fp32 DeepSpeed reports no norm, and clips by the mean of the ranks' own norms.
Under expert parallelism that is not the norm of the whole gradient: the sum of squares of one rank
misses the experts of the others.

At stages 1 and 2 it sums squares over every rank's partition of the gradient (get_grad_norm_direct
in runtime/zero/stage_1_and_2.py), but on tensor ranks other than the first it leaves out each
parameter that is not marked as model-parallel, since the first one has the same. That is true of
parameters whose state is partitioned over data-parallel ranks, each tensor rank having its own
partitions of them. The state of experts is partitioned over *all* ranks that hold them, and expert
groups span tensor ranks: the part of an expert's gradient on a tensor rank other than the first is
on no other rank, and would not be counted. Therefore `mark_parts` marks experts as well.
"""

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn
from torch import distributed as dist

from icl_moe.deepspeed_internals import expert_parallel_group, tensor_parallel_group
from icl_moe.model.deepspeed_moe import exported_name
from icl_moe.model.tensor_parallel import is_split


def mark_parts(model: nn.Module) -> None:
    """Mark the parameters of which each tensor rank has a different part, so that the norm counts
    all parts: split parameters, and experts.
    """
    for name, parameter in model.named_parameters():
        vars(parameter)["tensor_model_parallel"] = is_split(exported_name(name)) or is_moe_param(
            parameter
        )


def global_norm(model: nn.Module) -> Tensor:
    """L2 norm of the reduced gradient over all parameters, each part and each expert counted once;
    float32, equal on every rank.
    """
    squares: dict[
        dist.ProcessGroup | None, list[Tensor]
    ] = {}  # by the group over whose ranks the parts of a parameter lie
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares.setdefault(_parts_group(parameter), []).append(
                parameter.grad.float().square().sum()
            )
    total = torch.zeros((), device=next(model.parameters()).device)
    for group, parts in squares.items():
        held_here = torch.stack(parts).sum()
        if group is not None:
            dist.all_reduce(held_here, group=group)
        total = total + held_here
    return total.sqrt()


def _parts_group(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    if is_moe_param(parameter):
        return expert_parallel_group(parameter)
    return tensor_parallel_group() if is_model_parallel_parameter(parameter) else None


def clip(model: nn.Module, norm: Tensor, largest: float) -> None:
    """Scale every gradient by largest / norm where the norm is above `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
