"""MT-AdamW against its formula, computed plainly in float64."""

import math

import pytest
import torch
from plain_mt_adamw import plain_step

from icl_moe.optim.mt_adamw import MTAdamW


def test_twenty_steps_of_two_tasks_equal_the_formula():
    torch.manual_seed(0)
    settings = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    parameters = [torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)]
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    norm = math.nan
    optimizer = MTAdamW(parameters, lambda: norm, weight_decay=0.1, **settings)
    for t in range(1, 21):
        probability, size = ((0.75, 100.0), (0.25, 0.01))[t % 3 == 0]
        gradients = [size * torch.randn_like(p) for p in parameters]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.probability = probability
        optimizer.step()
        expected = [
            plain_step(*state, gradient, norm, probability, t, decay=0.1, **settings)
            for state, gradient in zip(expected, gradients, strict=True)
        ]
        for parameter, (theta, _, _) in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), theta, atol=1e-12, rtol=1e-12)


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
