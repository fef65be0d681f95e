"""Queries that lack the class of their examples, whose mask is empty: regions beside those of a
source whose annotations name every class that an image shows.
"""

import zlib
from collections.abc import Mapping, Set
from dataclasses import replace

import numpy as np

from icl_moe.rle import encode_counts
from icl_moe.tasks.segmentation import MaskTarget
from preprocessing.pool import PoolRegion, region_keys
from preprocessing.region_table import RegionTable

NO_CLASS = ""
"""The class of what is shown of an image that has no region of its own."""


def with_absent(
    regions: RegionTable, present: Mapping[str, Set[str]], share: float, image_size: int
) -> tuple[RegionTable, int]:
    """The regions of a source, with regions of absent classes after them, and how many these are.
    Regions of `NO_CLASS` are left out.

    Absent classes are a `share` of each class's queries, or fewer where fewer images lack the
    class. Numbers that are not whole are rounded at random, so that classes of few regions have
    their share together. Such a region shows what the first region of its image shows, has no
    annotation, and may only be a query. The images are drawn at random, class by class.

    present: the name of each image -> every class that it shows. share: below 1.
    """
    keys = region_keys(regions)
    has_class = np.array([name != NO_CLASS for name in keys.names], dtype=bool)
    own = regions.select(has_class[keys.categories])
    counts = np.bincount(keys.categories, minlength=len(keys.names))
    numbers, first_of_image = np.unique(regions.image_numbers(), return_index=True)
    known = regions.images()
    images = [known[number].name for number in numbers.tolist()]
    nothing = encode_counts(np.zeros((image_size, image_size), dtype=bool))
    found: list[PoolRegion] = []
    for name, count in sorted(zip(keys.names, counts.tolist(), strict=True)):
        if name == NO_CLASS or not count:
            continue
        lacking = [place for place, image in enumerate(images) if name not in present[image]]
        rng = np.random.default_rng([zlib.crc32(b"absent"), zlib.crc32(name.encode())])
        wanted = int(count * share / (1 - share) + rng.random())
        for place in rng.permutation(lacking)[:wanted].tolist():
            region = regions[int(first_of_image[place])]
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
    return RegionTable.concatenate([own, RegionTable.of(found)]), len(found)
