"""Experts spread over the ranks of a group: bring the rows to the experts, or the experts' weights
to the rows.

Attribute routing sends whole spans to the same two experts, so at most four of eight experts work
on a batch of one task. If rows are sent to their experts, the rows of all ranks meet on the few
ranks that hold those experts. If the weights are sent to all ranks instead, every rank computes its
own rows, no rank is idle, and the volume does not grow with the batch. docs/parallelism.md has the
volumes and the work of both ways.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from icl_moe.model.moe import Route

Routes = list[Route]


def run_spread(
    routes: Routes, experts: Sequence[nn.Module], group: dist.ProcessGroup, ep_size: int
) -> list[Tensor]:
    """Run routes in the way that moves fewer bytes. Both ways give equal numbers, and every rank of
    the group makes the same choice.

    experts: those of this rank; rank r of the group holds the global ids from r * len(experts) on.
    All ranks of the group must call it together.
    """
    counts_RE = rows_by_rank(routes, len(experts), group, ep_size)
    parameters, width = sum(p.numel() for p in experts[0].parameters()), routes[0][1].shape[-1]
    rows, weights = moved_rows(counts_RE) * width, moved_weights(counts_RE) * parameters
    run = run_exchanged if rows <= weights else run_gathered
    return run(routes, experts, group, counts_RE)


def rows_by_rank(routes: Routes, local: int, group: dist.ProcessGroup, ep_size: int) -> Tensor:
    """How many rows each rank has for each expert, (ep_size, E), the same on every rank; each rank
    holds `local` experts.
    """
    device = routes[0][1].device
    counts_E = torch.zeros(ep_size * local, dtype=torch.int64, device=device)
    for expert, rows in routes:
        counts_E[expert] += len(rows)
    counts_RE = torch.empty(ep_size * ep_size * local, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts_RE, counts_E, group=group)
    return counts_RE.view(ep_size, -1).cpu()


def moved_rows(counts_RE: Tensor) -> int:
    """Rows that cross between ranks if rows go to the experts: there and back, in forward and in
    backward.
    """
    counts_RRL = counts_RE.unflatten(1, (len(counts_RE), -1))
    stay = counts_RRL.diagonal().sum()
    return 4 * int(counts_RE.sum() - stay)


def moved_weights(counts_RE: Tensor) -> int:
    """Experts that cross if their weights go to the rows: each one at work to every other rank, and
    its gradient back.
    """
    return 2 * int((counts_RE.sum(dim=0) > 0).sum()) * (len(counts_RE) - 1)


def run_exchanged(
    routes: Routes, experts: Sequence[nn.Module], group: dist.ProcessGroup, counts_RE: Tensor
) -> list[Tensor]:
    """Every route on the rank that holds its expert: rows go there and come back by all-to-all with
    uneven splits.
    """
    ep_size, local, mine = len(counts_RE), len(experts), dist.get_rank(group)
    order = sorted(range(len(routes)), key=lambda i: routes[i][0])
    rows = torch.cat([routes[i][1] for i in order])
    sent = counts_RE[mine].view(ep_size, local).sum(dim=1).tolist()
    # Rows that come here: from each rank in turn, ordered by this rank's experts.
    received_RL = counts_RE[:, mine * local : (mine + 1) * local].tolist()
    received = [sum(row) for row in received_RL]

    arrived = _UnevenAllToAll.apply(rows, sent, received, group)
    parts = arrived.split([count for row in received_RL for count in row])
    by_expert = [torch.cat(parts[e::local]) for e in range(local)]
    computed = [
        expert(x).split([row[e] for row in received_RL])
        for e, (expert, x) in enumerate(zip(experts, by_expert, strict=True))
    ]
    returned = torch.cat([computed[e][r] for r in range(ep_size) for e in range(local)])
    outputs = _UnevenAllToAll.apply(returned, received, sent, group).split(
        [len(routes[i][1]) for i in order]
    )
    back = dict(zip(order, outputs, strict=True))
    return [back[i] for i in range(len(routes))]


def run_gathered(
    routes: Routes, experts: Sequence[nn.Module], group: dist.ProcessGroup, counts_RE: Tensor
) -> list[Tensor]:
    """Every route on the rank that has its rows: the experts at work are sent to all ranks, their
    gradients back and added up.
    """
    first = dist.get_rank(group) * len(experts)
    active = counts_RE.sum(dim=0).nonzero().flatten().tolist()
    template = experts[0]
    like = parameters_to_vector(template.parameters())
    mine = {
        first + i: parameters_to_vector(expert.parameters())
        for i, expert in enumerate(experts)
        if first + i in active
    }
    # A rank that holds none of them must take part in the backward pass too, so its
    # placeholders require a gradient.
    vectors = [mine[e] if e in mine else torch.empty_like(like).requires_grad_() for e in active]
    owners = [e // len(experts) for e in active]
    gathered = dict(zip(active, _GatherWeights.apply(group, owners, *vectors), strict=True))
    weights = {e: _unflatten(vector, template) for e, vector in gathered.items()}
    # An expert that no rank has rows for was not sent; its routes, empty ones, come out as they
    # are.
    return [
        functional_call(template, weights[e], (rows,)) if e in weights else rows
        for e, rows in routes
    ]


def _unflatten(vector: Tensor, like: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*like.named_parameters(), strict=True)
    parts = vector.split([p.numel() for p in parameters])
    return {
        name: part.view(p.shape) for name, part, p in zip(names, parts, parameters, strict=True)
    }


class _GatherWeights(torch.autograd.Function):
    """Each vector from its owner (a rank of the group) to all ranks; the gradients of all ranks are
    added up on the owner.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, owners: list[int], *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.owners = group, owners
        received = tuple(vector.detach().clone() for vector in vectors)
        for vector, owner in zip(received, owners, strict=True):
            dist.broadcast(vector, dist.get_global_rank(group, owner), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mine = dist.get_rank(ctx.group)
        added = [gradient.contiguous().clone() for gradient in gradients]
        for gradient, owner in zip(added, ctx.owners, strict=True):
            dist.reduce(gradient, dist.get_global_rank(ctx.group, owner), group=ctx.group)
        return (
            None,
            None,
            *(
                gradient if owner == mine else None
                for gradient, owner in zip(added, ctx.owners, strict=True)
            ),
        )


class _UnevenAllToAll(torch.autograd.Function):
    """All-to-all of rows (N, M), `sent[r]` to rank r and `received[r]` from it; the gradient goes
    the other way.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _UnevenAllToAll.apply(gradients[0], *ctx.splits), None, None, None
