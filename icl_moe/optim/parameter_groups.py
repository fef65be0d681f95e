"""Parameter groups: weight decay on matrices, none on norms, biases and embeddings, experts marked
for DeepSpeed.
"""

import re
from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from icl_moe.model.deepspeed_moe import exported_name
from icl_moe.model.router import GATE


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with a `name`, which DeepSpeed requires if there are experts;
    empty groups are left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if _is_matrix(name, parameter) else plain).append(parameter)
    return _for_deepspeed(
        [
            {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
            {"name": "plain", "params": plain, "weight_decay": 0.0},
        ]
    )


def muon_groups(model: nn.Module, weight_decay: float, rate_ratio: float) -> list[dict[str, Any]]:
    """The parameter groups for Muon, which updates the matrices between hidden states, except those
    of gates.

    rate_ratio: the matrices' learning rate divided by that of the other parameters.
    """
    fused: list[nn.Parameter] = []
    hidden: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        name = exported_name(name)
        if not _is_matrix(name, parameter):
            plain.append(parameter)
        elif re.search(GATE, name):
            gates.append(parameter)
        else:
            (fused if ".qkv." in name else hidden).append(parameter)
    matrices = {"weight_decay": weight_decay, "rate_ratio": rate_ratio}
    return _for_deepspeed(
        [
            {"name": "qkv", "params": fused, "matrices_in_one": 3, **matrices},
            {"name": "hidden", "params": hidden, "matrices_in_one": 1, **matrices},
            {"name": "gates", "params": gates, "weight_decay": weight_decay},
            {"name": "plain", "params": plain, "weight_decay": 0.0},
        ]
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and "embedding" not in name


def _for_deepspeed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        group
        for group in split_params_into_different_moe_groups_for_optimizer(groups)
        if group["params"]
    ]
