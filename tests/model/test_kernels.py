"""The decoder's own kernels compared with the plain formulas: linear layers, cross-entropy at
targets, blockwise causal attention.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icl_moe.model.kernels import blockwise_attention, chunked_cross_entropy, cross_entropy
from icl_moe.model.kernels.onednn_linear import Linear, product

BOUNDS = {torch.float32: dict(atol=1e-6, rtol=1e-5), torch.bfloat16: dict(atol=3e-2, rtol=3e-2)}
precisions = pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(value: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value.float().sin().sum(), wanted))


@precisions
@pytest.mark.parametrize(
    "shape", [(7, 16), (2, 3, 16), (16,), (0, 16)], ids=["rows", "batch", "vector", "no rows"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torchs_in_value_and_gradients(shape, bias, dtype):
    (x,) = leaves(shape, dtype=dtype)
    ours = Linear(16, 24, bias=bias).to(dtype)
    theirs = torch.nn.Linear(16, 24, bias=bias).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), **BOUNDS[dtype])
    for mine, expected in zip(
        gradients(ours(x), [x, *ours.parameters()]),
        gradients(theirs(x), [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, **BOUNDS[dtype])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **BOUNDS[dtype])


def test_linear_computes_in_bfloat16_under_autocast():
    (x,) = leaves((5, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(16, 8)(x).dtype == torch.bfloat16


@precisions
def test_product_equals_torchs_whatever_is_transposed(dtype):
    a, b = (x.detach() for x in leaves((9, 6), (9, 5), dtype=dtype))
    torch.testing.assert_close(product(a.t(), b), a.t() @ b, **BOUNDS[dtype])
    torch.testing.assert_close(product(a.t(), b.t().contiguous().t()), a.t() @ b, **BOUNDS[dtype])


@precisions
@pytest.mark.parametrize("targets", [1, 5, 16, 23])
def test_chunked_cross_entropy_equals_the_plain_one_in_value_and_gradients(
    targets, dtype, monkeypatch
):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK", 8)
    monkeypatch.setattr(chunked_cross_entropy, "ROWS", 3)
    hidden_PM, embedding_VM = leaves((targets, 16), (50, 16), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    labels_P = torch.randint(0, 50, (targets,), generator=generator)
    weights_P = torch.rand(targets, generator=generator)
    weighted_sum, losses_P = cross_entropy(hidden_PM, embedding_VM, labels_P, weights_P)
    expected_P = F.cross_entropy(
        F.linear(hidden_PM, embedding_VM).float(), labels_P, reduction="none"
    )
    torch.testing.assert_close(
        losses_P, expected_P.detach(), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2
    )
    assert weighted_sum.item() == pytest.approx((losses_P * weights_P).sum().item(), rel=1e-6)
    wanted = [hidden_PM, embedding_VM]
    ours = torch.autograd.grad(weighted_sum * 0.3, wanted)
    plain = torch.autograd.grad((expected_P * weights_P).sum() * 0.3, wanted)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, **BOUNDS[dtype])


def test_cross_entropy_is_finite_where_the_target_is_all_but_impossible():
    hidden_PM = torch.tensor([[100.0]], requires_grad=True)
    weighted_sum, losses_P = cross_entropy(
        hidden_PM, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]), torch.ones(1)
    )
    assert losses_P.tolist() == [200.0]
    weighted_sum.backward()
    assert hidden_PM.grad.tolist() == [[2.0]]


def test_cross_entropy_without_gradients_leaves_them_out():
    hidden_PM, embedding_VM = leaves((4, 16), (50, 16))
    labels_P, weights_P = torch.arange(4), torch.ones(4)
    with torch.no_grad():
        found = cross_entropy(hidden_PM, embedding_VM, labels_P, weights_P)
    assert not found[0].requires_grad
    assert torch.equal(found[1], cross_entropy(hidden_PM, embedding_VM, labels_P, weights_P)[1])


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


@precisions
@pytest.mark.parametrize("length", [1, 4, 11])
def test_attention_by_blocks_equals_the_formula_in_value_and_gradients(length, dtype, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "BLOCK", 4)
    qkv = leaves(*[(3, length, 8)] * 3, dtype=dtype)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    ours, expected = blockwise_attention.blockwise_attention(*qkv, 0.0), plain_attention(*exact)
    torch.testing.assert_close(ours.float(), expected, **BOUNDS[dtype])
    for mine, reference in zip(gradients(ours, qkv), gradients(expected, exact), strict=True):
        torch.testing.assert_close(mine.float(), reference, **BOUNDS[dtype])


def test_causal_attention_takes_any_number_of_heads_before_length_and_width():
    q, k, v = leaves(*[(2, 3, 5, 8)] * 3, dtype=torch.bfloat16)
    together = blockwise_attention.causal_attention(q, k, v)
    alone = torch.stack(
        [blockwise_attention.causal_attention(*parts) for parts in zip(q, k, v, strict=True)]
    )
    torch.testing.assert_close(together, alone)


def test_attention_dropout_drops_the_same_weights_in_the_backward_pass(monkeypatch):
    """If the values are a basis, the output is the attention matrix after dropout, which shows what
    was kept.
    """
    monkeypatch.setattr(blockwise_attention, "BLOCK", 4)
    q, k = leaves((1, 10, 10), (1, 10, 10))
    v = torch.eye(10)[None].requires_grad_()
    torch.manual_seed(0)
    weights = blockwise_attention.causal_attention(q, k, v, dropout=0.4)
    kept = weights != 0
    torch.testing.assert_close(weights, torch.where(kept, plain_attention(q, k, v) / 0.6, 0.0))
    assert 0.4 < kept.sum() / 55 < 0.8
    upstream = torch.randn(1, 10, 10, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(weights, [q, k, v], upstream, retain_graph=True)
    mask = kept / 0.6
    scores = (q @ k.transpose(1, 2) / math.sqrt(10)).masked_fill(
        torch.ones(10, 10, dtype=torch.bool).triu(1), -math.inf
    )
    expected = torch.autograd.grad((scores.softmax(dim=-1) * mask) @ v, [q, k, v], upstream)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_attention_dropout_follows_torchs_seed():
    q, k, v = (x.detach() for x in leaves(*[(2, 6, 4)] * 3))
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(blockwise_attention.causal_attention(q, k, v, dropout=0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
