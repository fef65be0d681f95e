"""Class masks -> pictures of several classes: the pool of semantic segmentation, made from that of
segmentation, and the colours of its episodes.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks import SEMANTIC_SEGMENTATION
from icl_moe.tasks.semantic_segmentation import COLOURS, ClassesTarget
from preprocessing.pool import Pool, PoolRegion
from preprocessing.region_table import RegionTable

MOST_COMBINATIONS = 64
"""Of an image's classes; an image of a dozen classes has hundreds."""


def combine_classes(pool: Pool, most: int, least_scale: float, image_size: int) -> Pool:
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
    combined = (
        region
        for numbers in of_image.values()
        for region in _combinations(
            [pool.regions[number] for number in numbers],
            most,
            least_scale,
            image_size,
            pool.skipped,
        )
    )
    return replace(pool, task=SEMANTIC_SEGMENTATION.name, regions=RegionTable.of(combined))


def _combinations(
    regions: Sequence[PoolRegion],
    most: int,
    least_scale: float,
    image_size: int,
    skipped: Counter[str],
) -> Iterator[PoolRegion]:
    """The regions of several classes of one image."""
    of_class = {region.category: region for region in regions}
    taken: set[frozenset[str]] = set()
    left: set[frozenset[str]] = set()
    for region in regions:
        counts = {name: of for name, of in region.target.objects if name in of_class}
        masks = {name: _decoded(of, image_size) for name, of in counts.items()}
        large = sorted(masks, key=lambda name: (-int(masks[name].sum()), name))
        for size in range(2, most + 1):
            for names in itertools.combinations(large, size):
                if region.category not in names or frozenset(names) in taken:
                    continue
                if len(taken) == MOST_COMBINATIONS:
                    left.add(frozenset(names))
                    continue
                taken.add(frozenset(names))
                visible = _visible({name: masks[name] for name in names})
                shares = [float(mask_HW.mean()) for mask_HW in visible.values()]
                if min(shares) == 0 or min(shares) < least_scale:
                    skipped["combinations_of_small_scale"] += 1
                    continue
                parts = [of_class[name] for name in sorted(names)]
                yield replace(
                    region,
                    category=" + ".join(sorted(names)),
                    annotations=tuple(number for part in parts for number in part.annotations),
                    scale=sum(shares),
                    target=ClassesTarget(
                        tuple((name, _encoded(visible[name])) for name in sorted(names))
                    ),
                    instance=None,
                    provenance=tuple(each for part in parts for each in part.provenance),
                    group="",
                )
    skipped["combinations_of_an_image_with_many"] += len(left)


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
    for index, members in enumerate(episodes.tolist()):
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


def _encoded(mask_HW: np.ndarray) -> bytes:
    return encode_rle(mask_HW)["counts"].encode("ascii")
