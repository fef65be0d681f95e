"""Learning a mask tokenizer from the masks of a shard folder, and what it is worth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.mask_scores import score_masks
from icl_moe.tokenizers.masks import PatchTokenizer, mask_cells, nearest_patch

_ITERATIONS = 30
_HELD_OUT = 10
"""Every tenth episode is measured, and the others are learned from."""


@dataclass(frozen=True)
class MaskReport:
    """On episodes that were not learned from. ceiling: mIoU of masks that were encoded and decoded.
    entropy: -sum p ln p of the codes, in nats a cell, the loss of a model that looks at nothing.
    """

    masks: int
    ceiling: float
    entropy: float


def learn_mask_tokenizer(location: str | Path, codes: int) -> tuple[PatchTokenizer, MaskReport]:
    """A tokenizer of `codes` patches, each as large as a cell of the shards' image tokenizer.

    Raises InputError where the shards hold no segmentation, or too few different cells.
    """
    shards = ShardSet(location)
    name = SEGMENTATION.name
    if not shards.count(name):
        raise InputError(f"{shards.location} holds no {name}, whose masks could be learned from.")
    if codes < 2:
        raise InputError(f"A mask tokenizer must have at least 2 codes, not {codes}.")
    side = shards.manifest.image_size // int(shards.manifest.format.codes_per_image**0.5)
    learned, held_out = [], []
    for index in tqdm(range(shards.count(name)), desc="reading masks", unit="episode"):
        sample = shards.sample(name, index)
        mask_HW = decode_rle(sample.meta["masks"][-1]).astype(bool)
        if index % _HELD_OUT:
            learned.append(mask_HW)
        else:
            held_out.append((sample.category, mask_HW))
    tokenizer = learn_patches(np.stack(learned or [mask for _, mask in held_out]), side, codes)
    return tokenizer, _report(tokenizer, held_out)


def learn_patches(masks_BHW: np.ndarray, side: int, codes: int, seed: int = 0) -> PatchTokenizer:
    """The patches that draw masks with the least squared error: k-means over the cells of
    `masks_BHW`, but for the first two, which are plain black and white; the others begin at random
    cells.
    """
    cells_NP = mask_cells(np.asarray(masks_BHW, dtype=np.float32), side).reshape(-1, side * side)
    distinct_UP, counts_U = np.unique(cells_NP, axis=0, return_counts=True)
    mixed_UP = distinct_UP[(distinct_UP.min(axis=1) == 0) & (distinct_UP.max(axis=1) == 1)]
    if len(mixed_UP) < codes - 2:
        raise InputError(
            f"These masks have {len(mixed_UP) + 2} different cells of {side} x {side} pixels, "
            f"fewer than {codes} codes; give more masks, or ask for fewer codes."
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
