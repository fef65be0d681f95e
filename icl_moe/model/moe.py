"""The sparse layer in training: deepspeed.moe, with our gate and dispatch where the recipe routes by attributes.

Each sparse layer is a deepspeed.moe.layer.MoE, so DeepSpeed's Experts, expert groups, parameter tagging and checkpoints are its own.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from torch import distributed as dist

from icl_moe.model.feed_forward import (
    ExpertRunner,
    FeedForward,
    attribute_gate,
    merged_weights,
    mix_by_segments,
    routes_streams,
    weighted_outputs,
)
from icl_moe.model.router import AttributeEmbedding, AttributeGate, RoutingPlan
from icl_moe.recipe import ModelSettings


def sparse_layer_factory(ep_size: int = 1) -> Callable[[ModelSettings, int], nn.Module]:
    """What `InContextDecoder` calls for each sparse layer so that it trains on deepspeed.moe."""

    def build(settings: ModelSettings, layer: int) -> nn.Module:
        return DeepSpeedFeedForward(settings, layer, ep_size)

    return build


class DeepSpeedFeedForward(MoE):
    """A deepspeed.moe layer that takes and gives the flat stream (T, M), dropless, and keeps its auxiliary loss for the model.

    `token`, and `attributes` whose gate reads tokens: stock top-k with GShard's loss. Stock adds Gumbel noise to the second choice in
    evaluation too, so that is off. `attributes` otherwise: the inner MOELayer is `AttributeMOELayer`.
    """

    def __init__(self, settings: ModelSettings, layer: int, ep_size: int) -> None:
        level = deepspeed_logger.level
        deepspeed_logger.setLevel(logging.WARNING)  # One line a layer on standard output says nothing that the recipe does not.
        super().__init__(
            settings.width,
            FeedForward(settings.width),
            num_experts=settings.experts,
            ep_size=ep_size,
            k=settings.experts_per_token,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        deepspeed_logger.setLevel(level)
        stock: MOELayer = self.get_submodule("deepspeed_moe")
        if routes_streams(settings):
            self.deepspeed_moe = AttributeMOELayer(settings, layer, stock)
        elif settings.feed_forward == "attributes" and settings.gate_input == "token+attributes":
            stock.gate = TokenAttributeGate(stock.gate, settings.width)
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> Tensor:
        out_TM, self.auxiliary_loss, _ = super().forward(x_TM, plan)
        return out_TM


class AttributeMOELayer(MOELayer):
    """DeepSpeed's MOELayer with a gate that reads the plan of attribute classes, and a dispatch by slices of the stream.

    The plan arrives as the layer's own `used_token` argument. The stock dispatch copies every routed row into an (E, C) buffer whose
    capacity C is the busiest expert's load, several times the rows that attribute routing needs.
    """

    def __init__(self, settings: ModelSettings, layer: int, stock: MOELayer) -> None:
        super().__init__(attribute_gate(settings, layer), stock.experts, stock.ep_group_name, stock.ep_size, stock.num_local_experts)
        self.combination = settings.combination

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self.ep_group = ep_group  # Our gate needs no group: it decides from the attributes, which every rank knows.

    def forward(self, *inputs: object, **_: object) -> Tensor:
        x_TM, plan = inputs
        assert isinstance(x_TM, Tensor) and isinstance(plan, RoutingPlan) and isinstance(self.gate, AttributeGate)
        decision = self.gate(plan)
        self.l_aux = decision.auxiliary_loss
        self.exp_counts = None  # Stock counts tokens an expert here; the plan and the gate's table say more.
        experts = list(self.experts.deepspeed_experts)
        if self.combination == "weights":
            return mix_by_segments(x_TM, plan, merged_weights(decision, experts))
        run = None if self.ep_size == 1 else run_exchanged(experts, self.ep_group, self.ep_size)
        return mix_by_segments(x_TM, plan, weighted_outputs(decision, experts, run))


class TokenAttributeGate(nn.Module):
    """Stock's gate, reading the sum of each token and of its attributes' embedding."""

    def __init__(self, stock: nn.Module, width: int) -> None:
        super().__init__()
        self.attributes = AttributeEmbedding(width)
        self.wg = stock.wg
        self._stock: list[Any] = [stock]  # In a list, so that its parameters are not registered twice.

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self._stock[0]._set_ep_group(ep_group)

    def forward(self, x_TM: Tensor, plan: RoutingPlan, sparse_routes: bool, use_tutel: bool) -> Any:
        return self._stock[0](x_TM + self.attributes(plan), None, sparse_routes, use_tutel)


def run_exchanged(experts: Sequence[nn.Module], group: dist.ProcessGroup, ep_size: int) -> ExpertRunner:
    """Runs every route on the rank of `group` that holds its expert: rows go there and come back by all-to-all with uneven splits.

    experts: this rank's; rank r of the group holds the global ids r * len(experts) and on. All ranks of the group must call it together.
    """
    local = len(experts)

    def run(routes: list[tuple[int, Tensor]]) -> list[Tensor]:
        order = sorted(range(len(routes)), key=lambda i: routes[i][0])
        rows = torch.cat([routes[i][1] for i in order])
        counts_E = torch.zeros(ep_size * local, dtype=torch.int64, device=rows.device)
        for expert, part in routes:
            counts_E[expert] += len(part)
        counts_RE = torch.empty(ep_size * ep_size * local, dtype=torch.int64, device=rows.device)
        dist.all_gather_into_tensor(counts_RE, counts_E, group=group)
        counts_RE = counts_RE.view(ep_size, -1)
        mine = dist.get_rank(group)
        sent = counts_RE[mine].view(ep_size, local).sum(dim=1).tolist()
        # Rows that come here: from each rank in turn, ordered by this rank's experts.
        received_RL = counts_RE[:, mine * local : (mine + 1) * local].tolist()
        received = [sum(row) for row in received_RL]

        arrived = _UnevenAllToAll.apply(rows, sent, received, group)
        parts = arrived.split([count for row in received_RL for count in row])
        by_expert = [torch.cat(parts[e::local]) for e in range(local)]
        computed = [expert(x).split([row[e] for row in received_RL]) for e, (expert, x) in enumerate(zip(experts, by_expert, strict=True))]
        returned = torch.cat([computed[e][r] for r in range(ep_size) for e in range(local)])
        outputs = _UnevenAllToAll.apply(returned, received, sent, group).split([len(routes[i][1]) for i in order])
        back = dict(zip(order, outputs, strict=True))
        return [back[i] for i in range(len(routes))]

    return run


class _UnevenAllToAll(torch.autograd.Function):
    """All-to-all of rows (N, M), `sent[r]` to rank r and `received[r]` from it; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _UnevenAllToAll.apply(gradients[0], *ctx.splits), None, None, None


_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def exported_name(name: str, first_expert: int = 0) -> str:
    """The name that a training parameter has in an exported model; `first_expert`: the global id of this rank's expert 0."""
    name = _EXPERT.sub(lambda match: f".experts.{int(match[1]) + first_expert}.", name)
    return name.replace(".deepspeed_moe.gate.", ".gate.")
