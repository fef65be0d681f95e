"""Which experts each kind of token goes to: the table that shows what an attribute gate has
learned.
"""

from typing import NamedTuple

import deepspeed
import torch

from icl_moe.attributes import describe_attributes
from icl_moe.batch import RoutingPlan
from icl_moe.deepspeed_internals import is_partitioned
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.router import StreamGate
from icl_moe.tables import Table
from icl_moe.tasks import streams


class Choice(NamedTuple):
    """What the gate of a layer chooses for an attribute class: the experts' global ids, best first,
    and their weights.
    """

    layer: int
    attributes: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]

    def cells(self) -> list[str]:
        """A row of `choices_table`."""
        chosen = ", ".join(
            f"{expert} ({weight:.2f})"
            for expert, weight in zip(self.experts, self.weights, strict=True)
        )
        return [str(self.layer), describe_attributes(self.attributes), chosen]


@torch.no_grad()
def expert_choices(decoder: InContextDecoder) -> list[Choice]:
    """The choices of every layer whose gate decides by attributes alone, in the order of the
    layers, without noise; an empty list for other models.

    Every rank has the whole gate, whichever experts it holds. At ZeRO stage 3 it must be gathered,
    so every rank calls it.
    """
    classes = tuple(streams(decoder.sequence_format))
    plan = RoutingPlan(
        classes, (), (), torch.full((1, len(classes)), 1 / len(classes), device=decoder.device)
    )
    choices = []
    for number, layer in enumerate(decoder.layers):
        for gate in (module for module in layer.modules() if isinstance(module, StreamGate)):
            parameters = list(gate.parameters())
            with deepspeed.zero.GatheredParameters(
                parameters, enabled=any(map(is_partitioned, parameters))
            ):
                decision = gate(plan)
            for attributes, experts, weights in zip(
                classes, decision.experts_CK.tolist(), decision.weights_CK.tolist(), strict=True
            ):
                choices.append(Choice(number, attributes, tuple(experts), tuple(weights)))
    return choices


def choices_table(choices: list[Choice]) -> Table:
    """A row for each layer and kind of token."""
    return Table(["layer", "stream", "experts (weights)"], [choice.cells() for choice in choices])
