"""Muon compared with torch's implementation, and the orthogonality of a matrix's step."""

import pytest
import torch

from icl_moe.optim import muon
from icl_moe.optim.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_twenty_steps_of_a_matrix_are_those_of_torch(shape, monkeypatch):
    # torch iterates in bfloat16 on every device.
    monkeypatch.setattr(muon, "computes_in_bf16", lambda _: True)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = dict(lr=0.02, weight_decay=0.1)
    optimizers = (
        Muon([{"params": [ours], "matrices_in_one": 1}], **settings),
        torch.optim.Muon([theirs], momentum=0.95, **settings),
    )
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    # The length of a step is lr, so the paths differ only by the rounding of bfloat16.
    assert (ours - theirs).norm() < 0.02 * (ours - 1).norm()


def test_what_is_no_matrix_takes_the_step_of_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizers = Muon([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        ours.grad = theirs.grad = None if step == 3 else torch.randn(7)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs)


def test_matrices_that_share_a_parameter_move_as_if_each_had_its_own():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(36, 12))
    apart = [torch.nn.Parameter(part.detach().clone()) for part in fused.chunk(3)]
    one = Muon([{"params": [fused], "matrices_in_one": 3}])
    three = Muon([{"params": apart, "matrices_in_one": 1}])
    for _ in range(5):
        fused.grad = torch.randn(36, 12)
        for part, gradient in zip(apart, fused.grad.chunk(3), strict=True):
            part.grad = gradient
        one.step()
        three.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in apart]))


def test_the_singular_values_of_an_orthogonal_step_are_near_one():
    torch.manual_seed(0)
    matrix = torch.randn(64, 16) @ torch.diag(torch.logspace(0, -2, 16))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diagonal(left.T @ orthogonal(matrix) @ right.T)
    assert values.min() > 0.6 and values.max() < 1.3
