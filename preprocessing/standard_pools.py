"""Files of fixed episodes -> pools of regions, and which of these form each episode."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.images import crop_and_resize_mask
from icl_moe.rle import encode_counts
from icl_moe.tasks.segmentation import MaskTarget
from preprocessing.caption_regions import caption_region, with_objects
from preprocessing.episode_file import EpisodeFile, FixedPair
from preprocessing.image_check import UsableImages
from preprocessing.pool import Pool, PoolRegion
from preprocessing.records import image_file
from preprocessing.standard_masks import MaskSource, mask_source
from preprocessing.workers import ordered_map

Shown = tuple[FixedPair, str]
"""A pair and its class, which is one region however many episodes show it."""


class FixedPool(NamedTuple):
    """A pool and its episodes: the numbers of their regions (episodes, shots + 1)."""

    pool: Pool
    episodes: np.ndarray


def read_fixed_pool(
    file: EpisodeFile, folder: Path, image_size: int, usable: UsableImages, workers: int
) -> FixedPool:
    """The pool of a file's episodes, whose images and masks lie in `folder`. Every pair shows the
    whole image, stretched to a square.

    Raises InputError if anything is missing or differs from what the episodes were made of.
    """
    numbers: dict[Shown, int] = {}
    episodes = np.array(
        [
            [numbers.setdefault((pair, episode.category), len(numbers)) for pair in episode.pairs]
            for episode in file.episodes
        ],
        dtype=np.int64,
    )
    pool = Pool(file.task, [])
    if file.task == "segmentation":
        regions = _mask_regions(file, folder, list(numbers), image_size, workers)
    else:
        regions = _described_regions(folder, list(numbers))
    kept = usable.keep(regions, folder, pool)
    if len(kept) < len(regions):
        named = [*pool.bad_images.values(), *(r.image.name for r in regions if r not in kept)]
        raise InputError(
            f"{folder} lacks {len(regions) - len(kept)} of the images of the episodes, or they "
            f"cannot be used, the first is {named[0].rstrip('.')}; all must be there, so that "
            "every model is asked the same."
        )
    pool.regions = regions
    return FixedPool(pool, episodes)


class _Cutter(NamedTuple):
    """What the workers need: the masks, the folder and the size of the model's images."""

    source: MaskSource
    folder: Path
    image_size: int


def _mask_regions(
    file: EpisodeFile, folder: Path, pairs: Sequence[Shown], image_size: int, workers: int
) -> list[PoolRegion]:
    cutter = _Cutter(mask_source(file, folder), folder, image_size)
    chunks = [pairs[start : start + 32] for start in range(0, len(pairs), 32)]
    regions: list[PoolRegion] = []
    with tqdm(total=len(pairs), desc="cutting masks", unit="mask") as progress:
        for cut in ordered_map(_cut, cutter, chunks, workers):
            regions += cut
            progress.update(len(cut))
    return regions


def _cut(cutter: _Cutter, pairs: Sequence[Shown]) -> list[PoolRegion]:
    return [_region(cutter, pair, category) for pair, category in pairs]


def _region(cutter: _Cutter, pair: FixedPair, category: str) -> PoolRegion:
    size, crop = cutter.image_size, (0, 0, pair.width, pair.height)

    def resized(mask_HW: np.ndarray) -> np.ndarray:
        return crop_and_resize_mask(mask_HW, crop, size)

    cut = {name: resized(mask) for name, mask in cutter.source.masks(pair, category).items()}
    ignored_HW = cutter.source.ignored(pair)
    ignored = b"" if ignored_HW is None else encode_counts(resized(ignored_HW) & ~cut[category])
    # The region's own mask may have no pixel left at this size; the episode is asked all the same.
    objects = tuple((name, encode_counts(mask)) for name, mask in cut.items() if mask.any())
    return PoolRegion(
        image_file(cutter.folder, pair.image, pair.width, pair.height, pair.image),
        category,
        pair.annotations,
        crop,
        float(cut[category].mean()),
        MaskTarget(encode_counts(cut[category]), objects, ignored),
    )


def _described_regions(folder: Path, pairs: Sequence[Shown]) -> list[PoolRegion]:
    regions = []
    for pair, category in pairs:
        image = image_file(folder, pair.image, pair.width, pair.height, pair.image)
        (annotation,), text = pair.annotations, str(pair.caption)
        region = caption_region(image, category, annotation, pair.normalised_box, text, (text,))
        if region is None:
            raise InputError(f"The episodes have an empty box in {pair.image}.")
        regions.append(region)
    return with_objects(regions)
