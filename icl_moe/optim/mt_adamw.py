"""Task-balanced AdamW (MT-AdamW): every task pushes the model with the same force, however large its gradients and however rare it is."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
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
        """One step of parameters that have taken equally many; `scale` is omega_k / ||G||."""
        beta1, beta2 = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        steps = int(states[0]["step"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        # The bias correction of n is drawn out of the root: m / (sqrt(n) / c + eps) = c m / (sqrt(n) + c eps), one pass less.
        correction = math.sqrt(1 - beta2**steps)
        for theta, g, m, n in _blocks(parameters, gradients, *moments):
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, g, alpha=(1 - beta1) / self.probability * scale)
            torch._foreach_mul_(n, beta2)
            torch._foreach_addcmul_(n, g, g, value=(1 - beta2) / self.probability * scale**2)
            denominators = torch._foreach_sqrt(n)
            torch._foreach_add_(denominators, correction * group["eps"])
            torch._foreach_mul_(theta, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(theta, m, denominators, value=-group["lr"] * correction / (1 - beta1**steps))


_BLOCK = 1 << 16  # elements: four tensors of them stay in a core's cache


def _blocks(*tensors: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The same pieces of every list of tensors: on a CPU small ones, so that the passes over a piece find it in the cache.

    Elsewhere, and where memory is not laid out alike, all at once: then each operation is one launch for all tensors.
    """
    if not all(tensor.is_cpu and tensor.is_contiguous() for group in tensors for tensor in group):
        yield tensors
        return
    for parts in zip(*tensors, strict=True):
        for block in zip(*(part.view(-1).split(_BLOCK) for part in parts), strict=True):
            yield tuple([piece] for piece in block)


def _runs(counts: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of each run of equal counts."""
    edges = [0, *(i for i in range(1, len(counts)) if counts[i] != counts[i - 1]), len(counts)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
