"""The global gradient norm where the engine has none: ZeRO stage 0 in fp32.

There DeepSpeed reports no norm, and clips by the mean of the ranks' own norms, which under expert parallelism is not the norm of the
whole gradient: a rank's own sum of squares misses the experts of the others. Stages 1 and 2 compute it rightly.
"""

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn
from torch import distributed as dist


def global_norm(model: nn.Module) -> Tensor:
    """L2 norm of the reduced gradient over all parameters, each expert counted once; float32 scalar, equal on every rank."""
    shared: list[Tensor] = []
    experts: dict[str, list[Tensor]] = {}  # by expert group
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        squared = parameter.grad.float().square().sum()
        if is_moe_param(parameter):
            experts.setdefault(str(vars(parameter)["group_name"]), []).append(squared)
        else:
            shared.append(squared)
    total = torch.stack(shared).sum()
    for name, squares in experts.items():
        held_here = torch.stack(squares).sum()
        dist.all_reduce(held_here, group=groups._get_expert_parallel_group(name))
        total = total + held_here
    return total.sqrt()


def clip(model: nn.Module, norm: Tensor, largest: float) -> None:
    """Scale every gradient by largest / norm where the norm is above `largest`."""
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
