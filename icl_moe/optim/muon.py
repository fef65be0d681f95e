"""Muon: matrices move along orthogonalised momentum, all else by AdamW.

A gradient of a matrix has few large singular values, and steps along it learn little else. Muon
gives all directions the same length, which reaches a loss in fewer tokens than AdamW.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from icl_moe.devices import computes_in_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of the quintic that takes singular values in 0..1 to about 1 in five iterations
(Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
"""


class Muon(torch.optim.Optimizer):
    """One optimizer for groups of two kinds. A group of matrices says in `matrices_in_one` how many
    each of its parameters holds, one below the other (3 where queries, keys and values share a
    parameter); of each of them

        B = mu B + (1 - mu) G;   U = mu B + (1 - mu) G
        theta = (1 - lr wd) theta - lr sqrt(max(1, rows / columns)) orthogonal(U)

    which is Nesterov's momentum and the scale of Jordan et al. All other groups take AdamW's step.
    Each group has its own `lr`. A matrix must be whole: neither ZeRO's partitions nor
    tensor-parallel parts are.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ) -> None:
        # `fused` says where the counts of AdamW's steps are kept.
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        super().__init__(params, {**defaults, "momentum": momentum, "matrices_in_one": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every group; `closure` is not supported."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrices_in_one"]:
                for parameter in moved:
                    self._move_matrices(parameter, group)
            elif moved:
                self._move_by_adamw(moved, group)

    def _move_matrices(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parts = group["matrices_in_one"]
        for matrix, update in zip(parameter.chunk(parts), ahead.chunk(parts), strict=True):
            scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.add_(orthogonal(update), alpha=-group["lr"] * scale)

    def _move_by_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix_RC: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, by Newton and Schulz's
    iteration; singular values of the result lie in about 0.7..1.2.

    In bfloat16 where the device computes in it, which the iteration forgives.
    """
    a, b, c = COEFFICIENTS
    x = matrix_RC.bfloat16() if computes_in_bf16(matrix_RC.device) else matrix_RC.float()
    x = x / x.norm().clamp(min=1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix_RC.dtype)
