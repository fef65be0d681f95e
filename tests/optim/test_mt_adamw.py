"""MT-AdamW compared with a plain computation of its formula in float64."""

import math

import pytest
import torch
from plain_mt_adamw import plain_step

from icl_moe.optim.mt_adamw import MTAdamW


@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    # If norms differ by a factor of 10,000, 1 - d is the difference of two numbers that agree in at
    # least eight digits.
    [((1.0, 1.0), 1e-12), ((100.0, 0.01), 1e-7)],
)
def test_twenty_steps_of_two_tasks_equal_the_formula(sizes, tolerance):
    torch.manual_seed(0)
    settings = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    parameters = [
        torch.randn(7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    ]
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    norm = math.nan
    optimizer = MTAdamW(parameters, lambda: norm, weight_decay=0.1, **settings)
    for t in range(1, 21):
        probability, omega, size = ((0.75, 1.0, sizes[0]), (0.25, 2.0, sizes[1]))[t % 3 == 0]
        gradients = [size * torch.randn_like(p) for p in parameters]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.probability, optimizer.weight = probability, omega
        optimizer.step()
        expected = [
            plain_step(*state, gradient, norm, probability, t, decay=0.1, omega=omega, **settings)
            for state, gradient in zip(expected, gradients, strict=True)
        ]
        for parameter, (theta, _, _) in zip(parameters, expected, strict=True):
            torch.testing.assert_close(
                parameter.detach(), theta, atol=tolerance / 10, rtol=tolerance
            )


def test_a_parameter_without_a_gradient_stands_still_and_counts_its_own_steps():
    torch.manual_seed(0)
    always, seldom = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = {
        p: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p), 0)
        for p in (always, seldom)
    }
    optimizer = MTAdamW([always, seldom], lambda: 3.0, lr=1e-2, weight_decay=0.1)
    for t in range(12):
        optimizer.probability = (0.75, 0.25)[t % 3 == 0]
        always.grad, seldom.grad = (
            torch.randn_like(always),
            torch.randn_like(seldom) if t % 4 == 3 else None,
        )
        optimizer.step()
        for parameter in (always, seldom):
            if parameter.grad is not None:
                theta, m, n, steps = expected[parameter]
                settings = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.1)
                moved = plain_step(
                    theta, m, n, parameter.grad, 3.0, optimizer.probability, steps + 1, **settings
                )
                expected[parameter] = (*moved, steps + 1)
            torch.testing.assert_close(
                parameter.detach(), expected[parameter][0], atol=1e-12, rtol=1e-12
            )


@pytest.mark.parametrize("norm", [None, 0.0, math.nan, math.inf, -1.0])
def test_without_a_usable_norm_nothing_moves(norm):
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    optimizer = MTAdamW([parameter], lambda: norm)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert not optimizer.state


def test_the_scale_of_a_tasks_gradient_does_not_matter():
    results = []
    for scale in (1.0, 1e4):
        parameter = torch.ones(3, requires_grad=True)
        parameter.grad = scale * torch.tensor([1.0, -2.0, 0.5])
        MTAdamW([parameter], lambda p=parameter: p.grad.norm()).step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)
