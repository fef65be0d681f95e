"""The step of MT-AdamW compared with torch's AdamW, fused and foreach: python
benchmarks/optimizer.py [--json FILE] [--device cuda]

On parameters of the paper's shapes, as in one process without ZeRO, and on one flat tensor, as in
ZeRO's partitions. They run in turns; compare the ratios.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from measure import Goal, in_turns, report

from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.optim.mt_adamw import MTAdamW
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe

REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    figures: dict[str, float] = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    goals = []
    for layout, shapes in (
        ("tensors", _shapes()),
        ("flat", [(sum(shape.numel() for shape in _shapes()),)]),
    ):
        mt, fused, foreach = _seconds([tuple(shape) for shape in shapes], options.device)
        for name, seconds in (("MT-AdamW", mt), ("AdamW fused", fused), ("AdamW foreach", foreach)):
            figures[f"{layout}, {name}, ms per step"] = 1000 * seconds
        goals.append(
            Goal(f"{layout}, MT-AdamW against fused AdamW", mt / fused, 1.15, at_most=True)
        )
        goals.append(
            Goal(f"{layout}, MT-AdamW against foreach AdamW", mt / foreach, 1.15, at_most=True)
        )
    report(figures, goals, options.json)


def _shapes() -> list[torch.Size]:
    """The shapes of paper_256 with 4 of its 12 layers, so that the states of three optimizers fit
    into a laptop's memory.
    """
    with torch.device("meta"):
        recipe = load_recipe(
            TrainingRecipe, "paper_256", ["model.layers=4", "model.layers_with_experts=[1,3]"]
        )
        model = InContextDecoder(DecoderConfig.from_recipe(recipe))
    return [parameter.shape for parameter in model.parameters()]


def _seconds(shapes: list[tuple[int, ...]], device: str) -> list[float]:
    """Median seconds of a step of MT-AdamW, fused and foreach AdamW."""

    def optimizer(make: type, **options: object) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return make(parameters, lr=1e-4, weight_decay=0.05, **options)

    optimizers = [
        optimizer(MTAdamW, norm=lambda: 100.0),
        optimizer(torch.optim.AdamW, fused=True),
        optimizer(torch.optim.AdamW, foreach=True),
    ]

    def step(chosen: torch.optim.Optimizer) -> None:
        chosen.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return in_turns(*(partial(step, chosen) for chosen in optimizers), repeats=REPEATS)


if __name__ == "__main__":
    main()
