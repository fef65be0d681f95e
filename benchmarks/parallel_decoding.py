"""Decoding masks in one pass compared with code by code: python benchmarks/parallel_decoding.py
[--json FILE]

A decoder of modern_demo's size with random weights completes the same queries in both ways in
turns: 64 cells (64 pixels at downsampling 8) and 256 cells, one query and sixteen at a time, one
example each. Both include decoding the codes to pixels. Compare the ratios.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from measure import Goal, in_turns, report

from icl_moe.inference.model import InContextModel
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import TrainingRecipe
from icl_moe.sequence import Episode, SequenceFormat
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.masks import PatchTokenizer
from icl_moe.tokenizers.text import TextTokenizer

SIDES = (64, 128)
BATCHES = (1, 16)
GOALS = {"64 cells, batch 1": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--repeats", type=int, default=9, help="repeats of each way (default %(default)s)"
    )
    options = parser.parse_args()
    figures: dict[str, float] = {"cores": len(os.sched_getaffinity(0))}
    ratios: dict[str, float] = {}
    for side in SIDES:
        model = random_model(side)
        cells = model.format.codes_per_image
        for batch in BATCHES:
            requests = random_requests(model, batch)
            ways = [
                partial(model.complete, requests, decoding=decoding)
                for decoding in ("parallel", "autoregressive")
            ]
            at_once, in_turn = in_turns(*ways, repeats=options.repeats)
            name = f"{cells} cells, batch {batch}"
            figures[f"{name}: ms per mask, in one pass"] = 1e3 * at_once / batch
            figures[f"{name}: ms per mask, code by code"] = 1e3 * in_turn / batch
            ratios[name] = in_turn / at_once
    figures |= {f"{name}: times faster": ratio for name, ratio in ratios.items()}
    report(
        figures, [Goal(name, ratios[name], bound) for name, bound in GOALS.items()], options.json
    )


def random_model(side: int) -> InContextModel:
    """modern_demo's decoder for pictures of `side` pixels, with random weights, and the shipped
    tokenizers.
    """
    recipe = load_recipe(TrainingRecipe, "modern_demo")
    tokenizers = ImageTokenizers(
        None,
        PatchTokenizer.from_pretrained("demo_masks"),
        FeaturesTokenizer.from_pretrained("demo_colours"),
    )
    cells = (side // tokenizers.downsampling) ** 2
    format = SequenceFormat(recipe.vocabulary, cells)
    recipe = replace(recipe, model=replace(recipe.model, positions=format.length(2)))
    config = DecoderConfig.from_recipe(
        recipe, format=to_dict(format), image_size=side, **tokenizers.fingerprints
    )
    decoder = InContextDecoder(config)
    initialise(decoder, seed=0)
    return InContextModel(decoder, tokenizers, TextTokenizer(recipe.vocabulary.text_merges))


def random_requests(model: InContextModel, count: int) -> list[tuple[Episode, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (count, 3, model.format.codes_per_image)
    codes = rng.integers(0, model.format.vocabulary.image_codes, shape)
    return [
        (Episode(SEGMENTATION, "", (SegmentationPair(image, mask),)), query)
        for image, mask, query in codes
    ]


if __name__ == "__main__":
    main()
