"""The sparse layer in training: deepspeed.moe, with this project's gate and dispatch if the recipe
routes by attributes.

Each sparse layer is a deepspeed.moe.layer.MoE, so DeepSpeed's Experts, expert groups and parameter
tagging are its own.

Experts lie on ranks as DeepSpeed puts them: the ep_size ranks of an expert group are neighbours
among *all* ranks, tensor ranks included, and rank r holds part r % ep_size of the experts
(`first_expert`). Tensor ranks hold experts whole and have the same tokens, so each of them computes
its share of the rows, in stock layers as well as in ours. The gradient of an expert is then the sum
over all ranks that hold it, tensor ranks included, divided by the number of data-parallel ranks,
which is exactly what DeepSpeed computes.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from icl_moe.batch import RoutingPlan
from icl_moe.deepspeed_internals import gather_tokens_by, tensor_parallel_group
from icl_moe.model.expert_parallel import run_spread
from icl_moe.model.feed_forward import FeedForward, reads_attributes, routes_streams, stream_gate
from icl_moe.model.moe import (
    Decision,
    combine,
    dispatch,
    mix_outputs,
    mix_weights,
    with_gradients_together,
)
from icl_moe.model.router import AttributeEmbedding, StreamGate, balancing_loss, full_precision
from icl_moe.model.tensor_parallel import enter, leave, place_share, share_of_rows
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
    """A deepspeed.moe layer that reads and returns the flat stream (T, M), drops no tokens, and
    keeps its auxiliary loss for the model.

    `token`, and `attributes` whose gate reads tokens: stock, with `StockTokenGate`. Stock adds
    Gumbel noise to the second choice in evaluation too, so that is off. `attributes` otherwise: the
    inner MOELayer is `AttributeMOELayer`.
    """

    def __init__(
        self, settings: ModelSettings, layer: int, ep_size: int, tp_rank: int = 0, tp_size: int = 1
    ) -> None:
        level = deepspeed_logger.level
        # DeepSpeed's line for each layer on standard output only repeats the recipe.
        deepspeed_logger.setLevel(logging.WARNING)
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
            gather_tokens_by(_gather_tokens)
        stock: MOELayer = self.get_submodule("deepspeed_moe")
        if routes_streams(settings):
            self.deepspeed_moe = AttributeMOELayer(settings, layer, stock, tp_rank, tp_size)
        else:
            stock.gate = StockTokenGate(stock.gate, settings, tp_size)
        self.auxiliary_loss: Tensor | None = None

    @property
    def stream_gate(self) -> StreamGate | None:
        """The gate, if it decides for whole streams, so that the decoder can ask it in advance."""
        gate = self.deepspeed_moe.gate
        return gate if isinstance(gate, StreamGate) else None

    def forward(self, x_TM: Tensor, plan: RoutingPlan, decision: Decision | None) -> Tensor:
        """decision: the decision of `stream_gate`, if there is one."""
        if decision is not None:
            # MoE passes this argument on unchanged to the layer within it.
            out_TM, *_ = super().forward(x_TM, (plan, decision))
            return out_TM
        out_TM, self.auxiliary_loss, _ = super().forward(x_TM, plan)
        return out_TM


class AttributeMOELayer(MOELayer):
    """DeepSpeed's MOELayer with a gate that reads the plan of attribute classes, and a dispatch by
    slices of the stream.

    The stock dispatch copies every routed row into an (E, C) buffer whose capacity C is the busiest
    expert's load, several times the rows that attribute routing needs. The plan and the gate's
    decision arrive as the layer's own `used_token` argument.
    """

    def __init__(
        self, settings: ModelSettings, layer: int, stock: MOELayer, tp_rank: int, tp_size: int
    ) -> None:
        super().__init__(
            stream_gate(settings, layer),
            stock.experts,
            stock.ep_group_name,
            stock.ep_size,
            stock.num_local_experts,
        )
        self.combination = settings.combination
        self.tp_rank, self.tp_size = tp_rank, tp_size
        # MoE reads both after every pass. The decoder gets the auxiliary loss from the gate itself,
        # and the table of the gate tells more than counts of tokens.
        self.l_aux = self.exp_counts = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        # Our gate needs no group: it decides from the attributes, which every rank knows.
        self.ep_group = ep_group

    def forward(self, *inputs: Any, **_: object) -> Tensor:
        x_TM, (plan, decision) = inputs
        if self.tp_size == 1:
            return combine(self._mix(dispatch(x_TM, plan), decision), x_TM, plan)
        # Each tensor rank has all rows, and computes its share of them.
        x_TM, decision = enter(x_TM), decision._replace(weights_CK=enter(decision.weights_CK))
        rows_C = dispatch(x_TM, plan)
        mine_C = [share_of_rows(rows, self.tp_rank, self.tp_size) for rows in rows_C]
        mixed_C = [
            place_share(mixed, len(rows), self.tp_rank, self.tp_size)
            for mixed, rows in zip(self._mix(mine_C, decision), rows_C, strict=True)
        ]
        return leave(combine(mixed_C, x_TM, plan))

    def _mix(self, rows_C: list[Tensor], decision: Decision) -> list[Tensor]:
        experts = list(self.experts.deepspeed_experts)
        if self.ep_size > 1:
            return mix_outputs(
                rows_C,
                decision,
                lambda routes: run_spread(routes, experts, self.ep_group, self.ep_size),
            )
        weights = with_gradients_together(experts)
        if self.combination == "weights":
            return mix_weights(rows_C, decision, experts, weights)
        return mix_outputs(
            rows_C,
            decision,
            lambda routes: [
                functional_call(experts[expert], weights[expert], (rows,))
                for expert, rows in routes
            ],
        )


class StockTokenGate(nn.Module):
    """Stock's top-k gate with full-precision weights, reading each token or the sum of it and of
    its attributes' embedding. Its auxiliary loss is `balancing_loss`: stock's own is over the whole
    stream, padding too.

    The plan arrives as the layer's `used_token` argument, which is a mask to stock's top-1 gate.
    """

    def __init__(self, stock: nn.Module, settings: ModelSettings, tp_size: int) -> None:
        super().__init__()
        if reads_attributes(settings):
            self.attributes = AttributeEmbedding(settings.width)
        gate = stock.get_submodule("wg")
        assert isinstance(gate, nn.Linear)
        self.wg = gate
        self._tp_size = tp_size
        # The stock gate is in a list, so that its parameters are not registered twice.
        self._stock: list[Any] = [stock]

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self._stock[0]._set_ep_group(ep_group)

    def forward(self, x_TM: Tensor, plan: RoutingPlan, sparse_routes: bool, use_tutel: bool) -> Any:
        if hasattr(self, "attributes"):
            x_TM = x_TM + self.attributes(plan)
        gate = self._stock[0]
        weight_EM = full_precision(self.wg.weight)
        _, capacity, experts, chosen_KT, *rest = functional_call(
            gate, {"wg.weight": weight_EM}, (x_TM, None, sparse_routes, use_tutel)
        )
        if gate.k == 1:
            capacity = self._places(rest[-1])
        probabilities_TE = F.linear(x_TM.float(), weight_EM).softmax(dim=-1)
        loss = balancing_loss(probabilities_TE, chosen_KT[0].long(), plan)
        return loss, capacity, experts, chosen_KT, *rest

    def _places(self, counts_E: Tensor) -> int:
        """Rows that an expert has room for: what the busiest one on any rank of the expert group
        gets, and a multiple of the tensor ranks, which share them evenly.

        Stock's top-1 gate bounds that by the tokens of its own rank, so that ranks whose streams
        differ in length could compute different numbers, and wait for each other forever.
        """
        places = counts_E.max()
        dist.all_reduce(places, op=dist.ReduceOp.MAX, group=self._stock[0].ep_group)
        return -(-int(places) // self._tp_size) * self._tp_size


def _gather_tokens(x: Tensor, dim: int = 0) -> Tensor:
    """The tensor ranks' shares, joined along `dim`; it replaces DeepSpeed's own function."""
    group = tensor_parallel_group()
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
