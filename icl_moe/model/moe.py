"""The sparse layer in training: deepspeed.moe, with our gate and dispatch where the recipe routes by attributes.

Each sparse layer is a deepspeed.moe.layer.MoE, so DeepSpeed's Experts, expert groups, parameter tagging and checkpoints are its own.
"""

import logging
import re
from collections.abc import Callable

from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from icl_moe.model.feed_forward import FeedForward, attribute_gate, mix_by_segments
from icl_moe.model.router import AttributeGate, RoutingPlan
from icl_moe.recipe import ModelSettings


def sparse_layer_factory(ep_size: int = 1) -> Callable[[ModelSettings, int], nn.Module]:
    """What `InContextDecoder` calls for each sparse layer so that it trains on deepspeed.moe."""

    def build(settings: ModelSettings, layer: int) -> nn.Module:
        return DeepSpeedFeedForward(settings, layer, ep_size)

    return build


class DeepSpeedFeedForward(MoE):
    """A deepspeed.moe layer that takes and gives the flat stream (T, M), dropless, and keeps its auxiliary loss for the model.

    `token`: stock top-k with GShard's loss. Stock adds Gumbel noise to the second choice in evaluation too, so that is off.
    `attributes`: the inner MOELayer is `AttributeMOELayer`.
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
        if settings.feed_forward == "attributes":
            stock = self.deepspeed_moe
            self.deepspeed_moe = AttributeMOELayer(
                attribute_gate(settings, layer), stock.experts, stock.ep_group_name, stock.ep_size, stock.num_local_experts
            )
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x_TM: Tensor, plan: RoutingPlan) -> Tensor:
        out_TM, self.auxiliary_loss, _ = super().forward(x_TM, plan)
        return out_TM


class AttributeMOELayer(MOELayer):
    """DeepSpeed's MOELayer with a gate that reads the plan of attribute classes, and a dispatch by slices of the stream.

    The plan arrives as the layer's own `used_token` argument. The stock dispatch copies every routed row into an (E, C) buffer whose
    capacity C is the busiest expert's load, several times the rows that attribute routing needs.
    """

    def _set_ep_group(self, ep_group: object) -> None:
        self.ep_group = ep_group  # Our gate needs no group: it decides from the attributes, which every rank knows.

    def forward(self, *inputs: object, **_: object) -> Tensor:
        x_TM, plan = inputs
        assert isinstance(x_TM, Tensor) and isinstance(plan, RoutingPlan) and isinstance(self.gate, AttributeGate)
        decision = self.gate(plan)
        self.l_aux = decision.auxiliary_loss
        self.exp_counts = None  # Stock counts tokens an expert here; the plan and the gate's table say more.
        return mix_by_segments(x_TM, plan, decision, self.experts.deepspeed_experts)


_EXPERT = re.compile(r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")


def exported_name(name: str, first_expert: int = 0) -> str:
    """The name that a training parameter has in an exported model; `first_expert`: the global id of this rank's expert 0."""
    name = _EXPERT.sub(lambda match: f".experts.{int(match[1]) + first_expert}.", name)
    return name.replace(".deepspeed_moe.gate.", ".gate.")
