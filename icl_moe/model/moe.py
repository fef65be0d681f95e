"""The sparse layer in training: deepspeed.moe, with our gate and dispatch where the recipe routes
by attributes.

Each sparse layer is a deepspeed.moe.layer.MoE, so DeepSpeed's Experts, expert groups and parameter
tagging are its own.

Experts lie on ranks as DeepSpeed puts them: the ep_size ranks of an expert group are neighbours
among *all* ranks, tensor ranks included, and rank r holds part r % ep_size of the experts
(`first_expert`). Tensor ranks hold experts whole and have the same tokens, so each of them computes
its share of the rows, stock layers and ours alike. The gradient of an expert is then the sum over
all ranks that hold it, tensor ranks too, divided by the number of data-parallel ranks, which is
just what DeepSpeed computes.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe import mappings
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from icl_moe.model.expert_parallel import run_spread
from icl_moe.model.feed_forward import (
    FeedForward,
    Mixture,
    attribute_gate,
    merged_weights,
    mix_by_segments,
    routes_streams,
    weighted_outputs,
)
from icl_moe.model.router import (
    AttributeDecision,
    AttributeEmbedding,
    AttributeGate,
    RoutingPlan,
    full_precision,
)
from icl_moe.model.tensor_parallel import divide_rows, enter, leave
from icl_moe.recipe import ModelSettings


def sparse_layer_factory(
    ep_size: int = 1, tp_rank: int = 0, tp_size: int = 1
) -> Callable[[ModelSettings, int], nn.Module]:
    """What `InContextDecoder` calls for each sparse layer so that it trains on deepspeed.moe."""

    def build(settings: ModelSettings, layer: int) -> nn.Module:
        return DeepSpeedFeedForward(settings, layer, ep_size, tp_rank, tp_size)

    return build


def first_expert(rank: int, ep_size: int, experts: int) -> int:
    """The global id of the first expert that a rank holds, of `experts` in a layer; it holds
    experts / ep_size from there on.
    """
    return rank % ep_size * (experts // ep_size)


class DeepSpeedFeedForward(MoE):
    """A deepspeed.moe layer that takes and gives the flat stream (T, M), dropless, and keeps its
    auxiliary loss for the model.

    `token`, and `attributes` whose gate reads tokens: stock top-k with GShard's loss. Stock adds
    Gumbel noise to the second choice in evaluation too, so that is off. `attributes` otherwise: the
    inner MOELayer is `AttributeMOELayer`.
    """

    def __init__(
        self, settings: ModelSettings, layer: int, ep_size: int, tp_rank: int = 0, tp_size: int = 1
    ) -> None:
        level = deepspeed_logger.level
        deepspeed_logger.setLevel(
            logging.WARNING
        )  # One line a layer on standard output says nothing that the recipe does not.
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
        if tp_size > 1:
            mappings._gather_tokens = _gather_tokens
        stock: MOELayer = self.get_submodule("deepspeed_moe")
        if routes_streams(settings):
            self.deepspeed_moe = AttributeMOELayer(settings, layer, stock, tp_rank, tp_size)
        else:
            stock.gate = StockTokenGate(stock.gate, settings)
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> Tensor:
        out_TM, self.auxiliary_loss, _ = super().forward(x_TM, plan)
        return out_TM


class AttributeMOELayer(MOELayer):
    """DeepSpeed's MOELayer with a gate that reads the plan of attribute classes, and a dispatch by
    slices of the stream.

    The plan arrives as the layer's own `used_token` argument. The stock dispatch copies every
    routed row into an (E, C) buffer whose capacity C is the busiest expert's load, several times
    the rows that attribute routing needs.
    """

    def __init__(
        self, settings: ModelSettings, layer: int, stock: MOELayer, tp_rank: int, tp_size: int
    ) -> None:
        super().__init__(
            attribute_gate(settings, layer),
            stock.experts,
            stock.ep_group_name,
            stock.ep_size,
            stock.num_local_experts,
        )
        self.combination = settings.combination
        self.tp_rank, self.tp_size = tp_rank, tp_size

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        # Our gate needs no group: it decides from the attributes, which every rank knows.
        self.ep_group = ep_group

    def forward(self, *inputs: object, **_: object) -> Tensor:
        x_TM, plan = inputs
        assert (
            isinstance(x_TM, Tensor)
            and isinstance(plan, RoutingPlan)
            and isinstance(self.gate, AttributeGate)
        )
        decision = self.gate(plan)
        self.l_aux = decision.auxiliary_loss
        self.exp_counts = (
            None  # Stock counts tokens an expert here; the plan and the gate's table say more.
        )
        if self.tp_size == 1:
            return mix_by_segments(x_TM, plan, self._mixture(decision))
        mix = self._mixture(decision._replace(weights_CK=enter(decision.weights_CK)))
        return leave(
            mix_by_segments(enter(x_TM), plan, divide_rows(mix, self.tp_rank, self.tp_size))
        )

    def _mixture(self, decision: AttributeDecision) -> Mixture:
        experts = list(self.experts.deepspeed_experts)
        if self.combination == "weights":
            return merged_weights(decision, experts)
        run = None if self.ep_size == 1 else run_spread(experts, self.ep_group, self.ep_size)
        return weighted_outputs(decision, experts, run)


class StockTokenGate(nn.Module):
    """Stock's top-k gate with full-precision weights, reading each token or the sum of it and of
    its attributes' embedding.
    """

    def __init__(self, stock: nn.Module, settings: ModelSettings) -> None:
        super().__init__()
        if settings.feed_forward == "attributes" and settings.gate_input == "token+attributes":
            self.attributes = AttributeEmbedding(settings.width)
        wg = stock.get_submodule("wg")
        assert isinstance(wg, nn.Linear)
        self.wg = wg
        self._stock: list[Any] = [
            stock
        ]  # In a list, so that its parameters are not registered twice.

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self._stock[0]._set_ep_group(ep_group)

    def forward(self, x_TM: Tensor, plan: RoutingPlan, sparse_routes: bool, use_tutel: bool) -> Any:
        if hasattr(self, "attributes"):
            x_TM = x_TM + self.attributes(plan)
        weights = {"wg.weight": full_precision(self.wg.weight)}
        arguments = (x_TM, None, sparse_routes, use_tutel)
        return functional_call(self._stock[0], weights, arguments)


def _gather_tokens(x: Tensor, dim: int = 0) -> Tensor:
    """In place of deepspeed.moe.mappings's own, with which stock layers join the tensor ranks'
    shares: that one hands gloo a flat output for an N-dimensional input, which gloo refuses.
    """
    group = groups.mpu.get_tensor_model_parallel_group()
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def exported_name(name: str, first_expert: int = 0) -> str:
    """The name that a training parameter has in an exported model; `first_expert`: the global id of
    this rank's expert 0.
    """
    name = _EXPERT.sub(lambda match: f".experts.{int(match[1]) + first_expert}.", name)
    return name.replace(".deepspeed_moe.gate.", ".gate.")
