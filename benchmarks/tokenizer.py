"""Speed of the image tokenizer compared with the published implementation: python
benchmarks/tokenizer.py [--json FILE]

Both encode and decode the same pictures in turns, at the released size (256 pixels, f16, 1024
codes) with the same random weights, in float32 and in bf16. The share of codes that bf16 changes is
measured with a trained tokenizer (the demo's, or --tokenizer DIR) on drawn scenes and their masks,
in equal parts as in episodes. Memory is that of measuring 60 and 240 pictures, each in a separate
process.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Goal, in_turns, report, run_apart
from published_vqgan import PublishedVQGAN
from torch import Tensor

from icl_moe.images import crop_and_resize, crop_and_resize_mask, mask_to_pixels, to_pixels
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing.synthetic import draw_picture, write_dataset
from preprocessing.tokenizers.measures import evaluate_tokenizer

PICTURES, REPEATS = 2, 5
FEW, MANY = 60, 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--tokenizer",
        default="demo",
        help="the trained tokenizer on which bf16 is compared with float32",
    )
    # The folder of pictures that this process measures.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(evaluate_tokenizer("demo", Path(options.measure))))
        return
    figures: dict[str, float] = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    goals = [*race(figures), *agreement(options.tokenizer, figures), *memory(figures)]
    report(figures, goals, options.json)


def race(figures: dict[str, float]) -> list[Goal]:
    """Images per second of both implementations, in both directions."""
    torch.manual_seed(0)
    config = VQGANConfig()
    published = PublishedVQGAN(config)
    ours, fast = (
        VQGAN.from_weights(config, published.state_dict(), origin="the published modules")
        for _ in range(2)
    )
    fast.precision = "bf16"
    pixels_B3HW = torch.rand(PICTURES, 3, config.image_size, config.image_size) * 2 - 1
    codes_BN = published.encode(pixels_B3HW)
    goals = []
    for name, given, runs in (
        ("encode", pixels_B3HW, (published.encode, ours.encode, fast.encode)),
        ("decode", codes_BN, (published.decode, ours.decode, fast.decode)),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        seconds = in_turns(*(partial(run, given) for run in runs), repeats=REPEATS)
        for who, time in zip(("published", "ours fp32", "ours bf16"), seconds, strict=True):
            figures[f"{name}, {who}, images/s"] = PICTURES / time
        goals.append(Goal(f"{name}, fp32 against published", seconds[0] / seconds[1], 1.0))
        goals.append(Goal(f"{name}, bf16 against published fp32", seconds[0] / seconds[2], 1.5))
    goals.append(
        Goal(
            "codes equal to the published, fp32", _share(ours.encode(pixels_B3HW) == codes_BN), 1.0
        )
    )
    furthest = (ours.decode(codes_BN) - published.decode(codes_BN)).abs().max()
    goals.append(Goal("largest difference of a pixel, fp32", float(furthest), 1e-4, at_most=True))
    return goals


def agreement(source: str, figures: dict[str, float]) -> list[Goal]:
    """The share of codes that are equal in bf16 and float32, with trained weights."""
    print("agreement ...", file=sys.stderr, flush=True)
    exact, fast = VQGAN.from_pretrained(source), VQGAN.from_pretrained(source, precision="bf16")
    rng = np.random.default_rng(0)
    shares: dict[str, list[float]] = {"scenes": [], "masks": []}
    for _ in range(16):
        image, masks = zip(*(draw_picture(rng) for _ in range(16)), strict=True)
        size = exact.config.image_size
        square = [(0, 0, min(picture.size), min(picture.size)) for picture in image]
        scenes = [
            to_pixels(crop_and_resize(picture, box, size))
            for picture, box in zip(image, square, strict=True)
        ]
        drawn = [
            mask_to_pixels(crop_and_resize_mask(picture_masks[0], box, size))
            for picture_masks, box in zip(masks, square, strict=True)
        ]
        for kind, pictures in (("scenes", scenes), ("masks", drawn)):
            pixels_B3HW = torch.stack(pictures)
            shares[kind].append(_share(exact.encode(pixels_B3HW) == fast.encode(pixels_B3HW)))
    for kind, values in shares.items():
        figures[f"codes of {kind} equal in bf16 and fp32"] = float(np.mean(values))
    return [
        Goal(
            "codes equal in bf16 and fp32",
            float(np.mean([np.mean(values) for values in shares.values()])),
            0.995,
        )
    ]


def memory(figures: dict[str, float]) -> list[Goal]:
    """Peak memory of `icl-moe tokenizer evaluate` on few pictures and on many."""
    print("memory ...", file=sys.stderr, flush=True)
    peaks = []
    for count in (FEW, MANY):
        with tempfile.TemporaryDirectory() as folder:
            write_dataset(Path(folder), images=count, seed=0)
            _, peak = run_apart([__file__, "--measure", f"{folder}/images"])
        figures[f"peak memory of measuring {count} pictures, MiB"] = peak
        peaks.append(peak)
    return [
        Goal(f"peak memory, {MANY} pictures against {FEW}", peaks[1] / peaks[0], 1.05, at_most=True)
    ]


def _share(equal: Tensor) -> float:
    return float(equal.double().mean())


if __name__ == "__main__":
    main()
