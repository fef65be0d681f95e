"""Task-balanced AdamW (MT-AdamW): every task pushes the model with the same force, however large its gradients and however rare it is."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MTAdamW(torch.optim.Optimizer):
    """AdamW on gradients normalised per task (Uni-Perceiver v2, section 4.4), for batches of one task each.

        g = omega_k G / ||G||
        m = b1 m + ((1 - b1) / s_k) g;   n = b2 n + ((1 - b2) / s_k) g^2
        theta = theta - lr (m_hat / (sqrt(n_hat) + eps) + wd theta)

    s_k is the probability with which the step's task was drawn and ||G|| the L2 norm of the gradient over *all* parameters, every
    expert once. m and n are shared by all tasks. 1 / s_k makes rare tasks count as often ones, and its mean over the draws is 1, so
    the usual bias correction stays right.

    The norm must be given, since under ZeRO this optimizer sees one partition of one group at a time: `norm` is asked at every call
    of `step`. Set `probability` (s_k) and `weight` (omega_k) before each. A norm that is missing, not positive or not finite is no
    step at all. Moments are float32 where parameters are; after normalisation the root mean square of g is 1 / sqrt(number of
    parameters), so eps must be 1e-8 or less.
    """

    def __init__(
        self,
        params: Iterable[Any],
        norm: Callable[[], float | Tensor | None],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._norm = norm
        self.probability = 1.0
        self.weight = 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every group; `closure` is not supported."""
        norm = self._norm()
        norm = math.nan if norm is None else float(norm)
        if not (math.isfinite(norm) and norm > 0):
            return
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for start, stop in _runs([self._count(parameter) for parameter in parameters]):
                self._update(parameters[start:stop], group, self.weight / norm)

    def _count(self, parameter: Tensor) -> int:
        """How many steps this parameter has taken, this one included."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _update(self, parameters: list[Tensor], group: dict[str, Any], scale: float) -> None:
        """All parameters in one pass per operation (foreach); they have taken equally many steps."""
        beta1, beta2 = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = int(states[0]["step"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=(1 - beta1) / self.probability * scale)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=(1 - beta2) / self.probability * scale**2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**steps))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, first, denominators, value=-group["lr"] / (1 - beta1**steps))


def _runs(counts: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal counts."""
    edges = [0, *(i for i in range(1, len(counts)) if counts[i] != counts[i - 1]), len(counts)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
