"""Learns a mask tokenizer from the masks of a shard folder or of a COCO instances file, and
measures it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.errors import InputError
from icl_moe.images import crop_and_resize_mask
from icl_moe.rle import decode_rle
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.mask_scores import score_masks
from icl_moe.tokenizers.masks import PatchTokenizer, mask_cells, nearest_patch
from preprocessing.coco import class_masks, load_instances

_ITERATIONS = 30
_HELD_OUT = 10
"""Every tenth mask is held out for measuring; the others are for learning."""

_PIXELS = 2**28
"""The most pixels of masks that are read from a shard folder, since they are kept in memory: those
of 4,096 masks of 256 x 256 pixels.
"""

_IMAGES = 2000
_LEAST_AREA = 0.01
"""The least area of a mask as a share of its image; smaller masks of an instances file are left
out.
"""


@dataclass(frozen=True)
class MaskReport:
    """Measures on the held-out masks. ceiling: mIoU of masks that were encoded and decoded.
    entropy: -sum p ln p of the codes in nats per cell, which is the loss of a model without any
    input.
    """

    masks: int
    ceiling: float
    entropy: float


def learn_mask_tokenizer(
    location: str | Path, codes: int, image_size: int = 256, cell: int = 16
) -> tuple[PatchTokenizer, MaskReport]:
    """Learn a tokenizer with `codes` patches.

    location: a shard folder, which provides the masks of its queries and the size of the cells; or
    a COCO instances file (.json), whose class masks are stretched to squares of image_size pixels
    and cut into cells of cell x cell pixels. Raises InputError if there are no masks, or too few
    different cells.
    """
    if codes < 2:
        raise InputError(f"A mask tokenizer must have at least 2 codes, not {codes}.")
    if str(location).endswith(".json"):
        masks = _masks_of_annotations(Path(location), image_size)
    else:
        shards = ShardSet(location)
        manifest = shards.manifest
        cell = manifest.image_size // math.isqrt(manifest.format.codes_per_image)
        masks = _masks_of_shards(shards)
    learned, held_out = [], []
    for number, (category, mask_HW) in enumerate(masks):
        if number % _HELD_OUT:
            learned.append(mask_HW)
        else:
            held_out.append((category, mask_HW))
    if not held_out:
        raise InputError(f"{location} has no masks to learn from.")
    tokenizer = learn_patches(np.stack(learned or [mask for _, mask in held_out]), cell, codes)
    return tokenizer, _report(tokenizer, held_out)


def _masks_of_shards(shards: ShardSet) -> Iterator[tuple[str, np.ndarray]]:
    """Class and mask (H, W) of each query; of evenly spaced ones if there are more than memory has
    room for.
    """
    name = SEGMENTATION.name
    if not shards.count(name):
        raise InputError(f"{shards.location} holds no {name}, so it has no masks to learn from.")
    most = max(_HELD_OUT, _PIXELS // shards.manifest.image_size**2)
    numbers = evenly_spaced(shards.count(name), most)
    for index in tqdm(numbers, desc="reading masks", unit="episode"):
        sample = shards.sample(name, index)
        yield sample.category, decode_rle(sample.meta["masks"][-1]).astype(bool)


def _masks_of_annotations(file: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Class and mask (size, size) of each class of each image; of about 2,000 evenly spaced images
    if there are more.
    """
    coco = load_instances(file)
    images = list(coco.imgs)[:: max(1, len(coco.imgs) // _IMAGES)]
    for number in tqdm(images, desc="reading masks", unit="image"):
        for category, mask_HW in class_masks(coco, number).items():
            if mask_HW.mean() >= _LEAST_AREA:
                whole = (0, 0, mask_HW.shape[1], mask_HW.shape[0])
                yield coco.cats[category]["name"], crop_and_resize_mask(mask_HW, whole, size)


def learn_patches(masks_BHW: np.ndarray, side: int, codes: int, seed: int = 0) -> PatchTokenizer:
    """Patches that represent masks with the least squared error: k-means over the cells of
    `masks_BHW`, starting from random cells, except that the first two patches are plain black and
    white.
    """
    cells_NP = mask_cells(np.asarray(masks_BHW, dtype=np.float32), side).reshape(-1, side * side)
    distinct_UP, counts_U = np.unique(cells_NP, axis=0, return_counts=True)
    mixed_UP = distinct_UP[(distinct_UP.min(axis=1) == 0) & (distinct_UP.max(axis=1) == 1)]
    if len(mixed_UP) < codes - 2:
        raise InputError(
            f"These masks have {len(mixed_UP) + 2} different cells of {side} x {side} pixels, "
            f"fewer than {codes} codes; provide more masks or choose fewer codes."
        )
    chosen = np.random.default_rng(seed).choice(len(mixed_UP), codes - 2, replace=False)
    plain = np.stack([np.zeros(side * side), np.ones(side * side)]).astype(np.float32)
    patches_KP = np.concatenate([plain, mixed_UP[chosen]])
    for _ in tqdm(range(_ITERATIONS), desc="learning patches", unit="round"):
        codes_U = nearest_patch(distinct_UP[None], patches_KP)[0]
        sums_KP = np.zeros(patches_KP.shape)
        np.add.at(sums_KP, codes_U, distinct_UP * counts_U[:, None])
        totals_K1 = np.bincount(codes_U, weights=counts_U, minlength=codes)[:, None]
        means_KP = np.where(totals_K1 > 0, sums_KP / np.maximum(totals_K1, 1), patches_KP)
        patches_KP = np.concatenate([plain, means_KP[2:]]).astype(np.float32)
    return PatchTokenizer(torch.from_numpy(patches_KP.reshape(codes, side, side)))


def _report(tokenizer: PatchTokenizer, masks: list[tuple[str, np.ndarray]]) -> MaskReport:
    codes_BN = tokenizer.encode(np.stack([mask_HW for _, mask_HW in masks]))
    drawn_BHW = (tokenizer.decode(codes_BN) > 0).numpy()
    scores = score_masks(
        (category, drawn_HW, mask_HW)
        for (category, mask_HW), drawn_HW in zip(masks, drawn_BHW, strict=True)
    )
    shares = np.unique(codes_BN, return_counts=True)[1] / codes_BN.size
    return MaskReport(len(masks), scores.miou, float(-(shares * np.log(shares)).sum()))
