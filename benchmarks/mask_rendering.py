"""The mask ceiling of a tokenizer for different renderings and thresholds: python
benchmarks/mask_rendering.py [--json FILE]

Every class mask of unseen drawn scenes is drawn in two grey levels, encoded, decoded, and
thresholded at several levels between the ground's and the object's. The figure is mask_miou of
`icl-moe tokenizer evaluate`.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icl_moe.images import crop_and_resize_mask, middle_square
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.synthetic import draw_scene

SCENES, SEED = 200, 4242
CUTS = (0.25, 0.375, 0.45, 0.5, 0.55, 0.625, 0.75)
"""Thresholds above which a pixel belongs to the object, from 0, the ground's level, to 1, the
object's.
"""
RENDERINGS = {
    "white on black": (-1.0, 1.0),
    "black on white": (1.0, -1.0),
    "light on dark grey": (-0.6, 0.6),
    "white on black, blurred": (-1.0, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--tokenizer", default="demo", help="a tokenizer's folder, or the name of a shipped one"
    )
    options = parser.parse_args()
    tokenizer = VQGAN.from_pretrained(options.tokenizer)
    masks_BHW, classes = _masks(tokenizer.config.image_size)
    print(
        f"{len(classes)} masks of {SCENES} scenes\n\n| mask_miou | {' | '.join(map(str, CUTS))} "
        f"|\n|---{'|---' * len(CUTS)}|"
    )
    table = {}
    for name, levels in RENDERINGS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        nearness_BHW = _redraw(tokenizer, masks_BHW, levels, blurred=name.endswith("blurred"))
        table[name] = [_miou(nearness_BHW > cut, masks_BHW, classes) for cut in CUTS]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in table[name])} |")
    if options.json:
        options.json.write_text(
            json.dumps({"cuts": CUTS, "mask_miou": table}, indent=1) + "\n", encoding="utf-8"
        )


def _masks(size: int) -> tuple[Tensor, list[str]]:
    """Boolean masks_BHW of all classes of the scenes, and their class names."""
    rng = np.random.default_rng(SEED)
    masks, classes = [], []
    for _ in range(SCENES):
        scene = draw_scene(rng)
        box = middle_square(scene.image.size)
        for name in sorted({o.name for o in scene.objects}):
            mask_HW = crop_and_resize_mask(scene.class_mask(name), box, size)
            if mask_HW.any():
                masks.append(torch.from_numpy(mask_HW))
                classes.append(name)
    return torch.stack(masks), classes


def _redraw(
    tokenizer: VQGAN, masks_BHW: Tensor, levels: tuple[float, float], blurred: bool
) -> Tensor:
    """Every pixel's level after encoding and decoding, from 0, the ground's, to 1, the object's."""
    ground, figure = levels
    drawn_BHW = masks_BHW.float()
    if blurred:
        drawn_BHW = F.avg_pool2d(
            drawn_BHW[:, None], 3, stride=1, padding=1, count_include_pad=False
        )[:, 0]
    pixels_B3HW = (ground + (figure - ground) * drawn_BHW)[:, None].expand(-1, 3, -1, -1)
    seen = torch.cat(
        [tokenizer.decode(tokenizer.encode(some)) for some in pixels_B3HW.split(32)]
    ).mean(dim=1)
    return (seen - ground) / (figure - ground)


def _miou(seen_BHW: Tensor, masks_BHW: Tensor, classes: list[str]) -> float:
    pixels: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for seen_HW, mask_HW, name in zip(seen_BHW, masks_BHW, classes, strict=True):
        pixels[name] += [int((seen_HW & mask_HW).sum()), int((seen_HW | mask_HW).sum())]
    return float(np.mean([intersection / union for intersection, union in pixels.values()]))


if __name__ == "__main__":
    main()
