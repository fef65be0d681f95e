"""What all sources of captions share: how a description becomes a region of the pool, and which
classes are described often enough.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from icl_moe.boxes import Box
from icl_moe.tasks.captioning import CaptionTarget
from preprocessing.pool import ImageFile, Pool, PoolRegion


def clean_phrase(text: Any) -> str:
    """A description without surplus whitespace and without its final full stop, which the
    sequence's template adds.
    """
    return " ".join(text.split()).rstrip(" .") if isinstance(text, str) else ""


def caption_region(
    image: ImageFile,
    category: str,
    annotation: Any,
    box: Box,
    phrase: str,
    references: tuple[str, ...],
    style: str = "",
) -> PoolRegion | None:
    """A region of the captioning pool; None if the box is empty.

    It shows the whole image, stretched to a square as in the paper: each box is exact as fractions
    of its image, and an image is encoded once for all of its regions.
    """
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    if area <= 0:
        return None
    crop = (0, 0, image.width, image.height)
    target = CaptionTarget(box, phrase, references)
    return PoolRegion(image, category, (annotation,), crop, area, target, style)


def with_objects(regions: Iterable[PoolRegion]) -> list[PoolRegion]:
    """The regions, each with all objects described in its image (`CaptionTarget.objects`)."""
    regions = list(regions)
    of_image: dict[str, dict[tuple[str, str, str, Box], None]] = {}
    for region in regions:
        target = region.target
        described = (region.category, region.style, target.caption, target.box)
        of_image.setdefault(region.image.name, {})[described] = None
    objects = {name: tuple(described) for name, described in of_image.items()}
    return [
        replace(region, target=replace(region.target, objects=objects[region.image.name]))
        for region in regions
    ]


def drop_rare_classes(pool: Pool, min_descriptions: int) -> None:
    """Leave out classes with at most `min_descriptions` regions."""
    rare = set(pool.class_counts()) - frequent_classes(pool, min_descriptions)
    pool.drop_classes(rare, "classes_with_too_few_descriptions")


def frequent_classes(pool: Pool, min_descriptions: int) -> set[str]:
    """The classes with more than `min_descriptions` regions."""
    counts = pool.class_counts()
    return {category for category, count in counts.items() if count > min_descriptions}
