"""Queries that lack the class of their examples, whose mask is empty: regions beside those of a
source whose annotations name every class that an image shows.
"""

import zlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import numpy as np

from icl_moe.errors import InputError
from icl_moe.rle import encode_rle
from icl_moe.tasks.segmentation import MaskTarget
from preprocessing.pool import PoolRegion, region_keys
from preprocessing.region_table import RegionTable

_TRIES = 16
"""How many draws, at least, are made for each region that is wanted."""


def with_absent(
    regions: RegionTable, present: Mapping[str, Set[str]], share: float, image_size: int
) -> RegionTable:
    """The regions of a source, and so many of absent classes that these are `share` of all.

    Such a region shows what a random region shows, is of a class that its image lacks, has no
    annotation, and may only be a query. A class is drawn in proportion to its regions, so that the
    same share of each class's queries lack it; an image is asked for a class at most once. There
    are fewer such regions where most images show most classes.

    present: the name of each image -> every class that it shows. share: below 1. Raises InputError
    if no image lacks a class of the others.
    """
    count = round(len(regions) * share / (1 - share))
    rng = np.random.default_rng(zlib.crc32(b"absent"))
    keys, asked = region_keys(regions), set[tuple[str, str]]()
    nothing = encode_rle(np.zeros((image_size, image_size), dtype=bool))["counts"].encode("ascii")
    found: list[PoolRegion] = []
    turns = max(_TRIES, -(-_TRIES * count // max(len(regions), 1)))
    for number in _in_turn(rng, len(regions), turns):
        if len(found) == count:
            break
        region = regions[number]
        name = keys.names[keys.categories[rng.integers(len(regions))]]
        image = region.image.name
        if name in present[image] or (image, name) in asked:
            continue
        asked.add((image, name))
        found.append(
            replace(
                region,
                category=name,
                annotations=(),
                scale=0.0,
                target=MaskTarget(nothing, region.target.objects),
                role="query",
            )
        )
    if count and not found:
        raise InputError(
            "segmentation.absent asks for images that lack a class, but each image shows every "
            "class; set it to 0."
        )
    return RegionTable.concatenate([regions, RegionTable.of(found)])


def _in_turn(rng: np.random.Generator, regions: int, turns: int) -> Iterator[int]:
    """The numbers of all regions, `turns` times, each time in another random order."""
    for _ in range(turns):
        yield from rng.permutation(regions).tolist()
