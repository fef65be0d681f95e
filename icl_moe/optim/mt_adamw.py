"""Task-balanced AdamW (MT-AdamW): every task has the same influence on the model, whatever the size
of its gradients and however rare it is.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class MTAdamW(torch.optim.Optimizer):
    """AdamW on gradients normalised per task (Uni-Perceiver v2, section 4.4), for batches of one
    task each.

        g = omega_k G / ||G||
        m = b1 m + ((1 - b1) / s_k) g;   n = b2 n + ((1 - b2) / s_k) g^2
        theta = theta - lr (m_hat / (sqrt(n_hat) + eps) + wd theta)

    s_k is the probability with which the step's task was drawn and ||G|| the L2 norm of the
    gradient over *all* parameters, every expert once. m and n are shared by all tasks. 1 / s_k
    makes rare tasks count as often ones, and its mean over the draws is 1, so the usual bias
    correction stays right.

    The norm must be given, since under ZeRO this optimizer sees one partition of one group at a
    time: `norm` is asked at every call of `step`. Set `probability` (s_k) and `weight` (omega_k)
    before each. If the norm is missing, not positive or not finite, nothing is changed. After
    normalisation the root mean square of g is 1 / sqrt(number of parameters), so eps must be 1e-8
    or less.

    The arithmetic is done by torch's fused AdamW, one pass over memory. m is a weighted sum of
    gradients, so it is kept as their weighted mean M (`exp_avg`, float32 if the parameter is) times
    the sum of the weights Z (`weight`, float64), and n in the same way:

        w = omega_k / (s_k ||G||);        c = b1 Z_before / Z
        m = Z M;   Z = b1 Z + (1 - b1) w;   M = c M + (1 - c) G

        v = omega_k^2 / (s_k ||G||^2);    d = b2 Y_before / Y
        n = Y N;   Y = b2 Y + (1 - b2) v;   N = d N + (1 - d) G^2

    which are AdamW's own moments of G with c and d for b1 and b2. The rest of the formula goes
    into its learning rate and eps. If the norm is R times that of earlier steps, 1 - d has a
    relative error of about 1e-13 R^2: float32's own precision at R = 1,000, and 1e-5 at R = 10,000.
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
            alike: dict[
                tuple[float, ...], list[Tensor]
            ] = {}  # Parameters that went the same way; one that had no gradient did not.
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(self._history(parameter), []).append(parameter)
            for history, parameters in alike.items():
                self._update(parameters, group, norm, *history)

    def _history(self, parameter: Tensor) -> tuple[float, ...]:
        """Its number of steps, Z and Y before this one."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["weight"] = torch.zeros((), dtype=torch.float64)
            state["weight_sq"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return tuple(float(state[name]) for name in ("step", "weight", "weight_sq"))

    def _update(
        self,
        parameters: list[Tensor],
        group: dict[str, Any],
        norm: float,
        step: float,
        weight: float,
        weight_sq: float,
    ) -> None:
        """One step of parameters with the same history."""
        beta1, beta2 = group["betas"]
        step += 1
        decayed, decayed_sq = beta1 * weight, beta2 * weight_sq
        weight = decayed + (1 - beta1) * self.weight / (self.probability * norm)
        weight_sq = decayed_sq + (1 - beta2) * self.weight**2 / (self.probability * norm**2)
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"].fill_(step)
            state["weight"].fill_(weight)
            state["weight_sq"].fill_(weight_sq)
        # m_hat / (sqrt(n_hat) + eps) = ratio M / (sqrt(N) + eps / root)
        root = math.sqrt(weight_sq / (1 - beta2**step))
        ratio = weight / (1 - beta1**step) / root
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            # The bias correction is in `ratio` and `root`; after infinitely many steps AdamW's own
            # is none.
            [torch.full((), math.inf, device=parameters[0].device)] * len(parameters),
            lr=group["lr"] * ratio,
            beta1=decayed / weight,
            beta2=decayed_sq / weight_sq,
            weight_decay=group["weight_decay"] / ratio,
            eps=group["eps"] / root,
            amsgrad=False,
            maximize=False,
        )
