"""Class masks -> pictures of several classes: the pool of semantic segmentation, made from that of
segmentation, and the colours of its episodes.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from icl_moe.rle import decode_rle, encode_counts
from icl_moe.tasks import SEMANTIC_SEGMENTATION
from icl_moe.tasks.semantic_segmentation import COLOURS, ClassesTarget
from preprocessing.pool import Pool, PoolRegion
from preprocessing.region_table import RegionTable
from preprocessing.workers import ordered_map

MOST_COMBINATIONS = 64
"""The most combinations of one image's classes; an image of a dozen classes has hundreds."""

_CHUNK = 32
"""Images whose classes a process combines at once."""


class _Combining(NamedTuple):
    """What processes combine by."""

    regions: Sequence[PoolRegion]
    most: int
    least_scale: float
    image_size: int


def combine_classes(
    pool: Pool, most: int, least_scale: float, image_size: int, workers: int = 0
) -> Pool:
    """The pool in which a region shows 2 to `most` classes of an image, and is of the class of
    their names, such as "cat + dog".

    Classes that have a region in the image are combined, each of which covers at least
    `least_scale` of the crop; of the crops of an image the first one that shows a combination is
    taken, and of its combinations those of the largest classes. Where masks overlap, a pixel
    belongs to the smaller one.
    """
    of_image: dict[tuple[str, str], list[int]] = {}
    for number, region in enumerate(pool.regions):
        of_image.setdefault((str(region.image.path), region.role), []).append(number)
    images = list(of_image.values())
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    work, tables = _Combining(pool.regions, most, least_scale, image_size), list[RegionTable]()
    with tqdm(total=len(images), desc="combining classes", unit="image") as progress:
        for chunk, (table, skipped) in zip(
            chunks, ordered_map(_combine_images, work, chunks, workers), strict=True
        ):
            tables.append(table)
            pool.skipped.update(skipped)
            progress.update(len(chunk))
    regions = RegionTable.concatenate(tables)
    return replace(pool, task=SEMANTIC_SEGMENTATION.name, regions=regions)


def _combine_images(work: _Combining, images: list[list[int]]) -> tuple[RegionTable, Counter[str]]:
    """The regions of several classes of some images, of which the numbers of the regions are given,
    and what is left out.
    """
    skipped = Counter[str]()
    found = (
        region
        for numbers in images
        for region in _combinations(work, [work.regions[number] for number in numbers], skipped)
    )
    return RegionTable.of(found), skipped


def _combinations(
    work: _Combining, regions: Sequence[PoolRegion], skipped: Counter[str]
) -> Iterator[PoolRegion]:
    """The regions of several classes of one image."""
    of_class = {region.category: region for region in regions}
    taken, small, has_more = set[frozenset[str]](), set[frozenset[str]](), False
    for region in regions:
        counts = {name: rle for name, rle in region.target.objects if name in of_class}
        masks = {name: _decoded(rle, work.image_size) for name, rle in counts.items()}
        # A class shows at most its whole mask, so a smaller one need not be tried with others.
        large = sorted(
            (name for name, mask_HW in masks.items() if _is_seen(mask_HW, work.least_scale)),
            key=lambda name: (-int(masks[name].sum()), name),
        )
        small |= {
            frozenset((region.category, name))
            for name in masks
            if name != region.category and not {name, region.category} <= set(large)
        }
        for names in _subsets(large, work.most):
            if region.category not in names or frozenset(names) in taken:
                continue
            if len(taken) == MOST_COMBINATIONS:
                has_more = True
                break
            visible = _visible({name: masks[name] for name in names})
            if not all(_is_seen(mask_HW, work.least_scale) for mask_HW in visible.values()):
                small.add(frozenset(names))
                continue
            taken.add(frozenset(names))
            parts = [of_class[name] for name in sorted(names)]
            yield replace(
                region,
                category=" + ".join(sorted(names)),
                annotations=tuple(number for part in parts for number in part.annotations),
                scale=sum(float(mask_HW.mean()) for mask_HW in visible.values()),
                target=ClassesTarget(
                    tuple((name, encode_counts(visible[name])) for name in sorted(names))
                ),
                instance=None,
                provenance=tuple(origin for part in parts for origin in part.provenance),
                group="",
            )
    skipped["combinations_of_small_scale"] += len(small - taken)
    skipped["images_with_more_combinations"] += has_more


def _is_seen(mask_HW: np.ndarray, least_scale: float) -> bool:
    return bool(mask_HW.any()) and float(mask_HW.mean()) >= least_scale


def _subsets(names: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    """The subsets of 2 to `most` names: small ones first, then by the order of their names."""
    for size in range(2, most + 1):
        yield from itertools.combinations(names, size)


def _visible(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pixels of each mask, the largest first, that no smaller one covers."""
    covered_HW = np.zeros_like(next(iter(masks.values())))
    visible = {}
    for name in reversed(masks):
        visible[name] = masks[name] & ~covered_HW
        covered_HW |= masks[name]
    return visible


def paint_episodes(pool: Pool, episodes: np.ndarray, seed: int) -> tuple[Pool, np.ndarray]:
    """Give each episode its own colours, drawn at random: a pool of the regions in the colours that
    episodes need, and the numbers of these in each episode, int64 (samples, examples + 1).
    """
    task, names = zlib.crc32(pool.task.encode()), list(COLOURS)
    numbers: dict[tuple[int, tuple[str, ...]], int] = {}
    painted = np.empty_like(episodes)
    for index, members in enumerate(tqdm(episodes.tolist(), desc="painting", unit="episode")):
        rng = np.random.default_rng([seed, task, 3, index])
        count = len(pool.regions[members[-1]].target.masks)
        drawn = rng.permutation(len(names))[:count].tolist()
        colours = tuple(names[place] for place in drawn)
        painted[index] = [numbers.setdefault((number, colours), len(numbers)) for number in members]
    regions = (
        replace(region, target=replace(region.target, colours=colours))
        for number, colours in numbers
        for region in [pool.regions[number]]
    )
    return replace(pool, regions=RegionTable.of(regions)), painted


def _decoded(counts: bytes, image_size: int) -> np.ndarray:
    return decode_rle({"size": [image_size, image_size], "counts": counts})
