"""Parameter groups: weight decay on matrices, none on norms, biases and embeddings, experts marked
for DeepSpeed.
"""

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with a `name`, which DeepSpeed requires if there are experts;
    empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
    return [
        group
        for group in split_params_into_different_moe_groups_for_optimizer(groups)
        if group["params"]
    ]
