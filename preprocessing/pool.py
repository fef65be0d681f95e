"""The pool: the common form of every source, a list of regions of one class each, from which
episodes are drawn.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from icl_moe.images import PixelBox


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image as its record describes it: `name` is its path within the folder of images, width
    and height are in pixels.
    """

    path: Path
    name: str
    width: int
    height: int

    @property
    def is_too_large(self) -> bool:
        """Whether Pillow refuses to read an image of this size, as a decompression bomb."""
        return self.width * self.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)


Role = Literal["both", "query", "example"]
"""Whether a region may be a query, an example or both."""


@dataclass(frozen=True, slots=True)
class PoolRegion:
    """What one pair of an episode is made from: an image, the class that it shows, and the task's
    target.

    annotations: ids in the source. crop: the part of the image that the model sees, stretched to
    image_size x image_size. scale: area of the object / area of the crop. target: the content of
    the pair's output, in the task's own type (such as `icl_moe.tasks.segmentation.MaskTarget`).
    style: how the target describes, if the source has several ways; an episode has one style.
    origin: for a composed image, the name of the photograph that the object was cut from, and for
    an augmented copy that of the image it was made from. instance:
    the object that the target is of, if one object appears in several images. provenance: where the
    parts of a composed target come from, as plain JSON values for KEY.json. role: whether it may be
    a query, an example or both. group: the group of the source's classes that its class is in, such
    as LVIS's frequencies.
    """

    image: ImageFile
    category: str
    annotations: tuple[Any, ...]
    crop: PixelBox
    scale: float
    target: Any
    style: str = ""
    origin: str = ""
    instance: tuple[Any, Any] | None = None
    provenance: tuple[Any, ...] = ()
    role: Role = field(default="both", repr=False)
    group: str = field(default="", repr=False)

    @property
    def photograph(self) -> str:
        """The name of the photograph that shows the object: the region's own image, except in
        compositions.
        """
        return self.origin or self.image.name

    @property
    def kind(self) -> tuple[str, str]:
        """Class and style, which all regions of an episode share."""
        return self.category, self.style


@dataclass
class Pool:
    """The regions of one task in the order of their source. skipped: reason -> how many things were
    left out. bad_images: name -> why the image could not be used. same_instance: the share of
    episodes whose regions all show one object in several images.
    """

    task: str
    regions: list[PoolRegion]
    skipped: Counter[str] = field(default_factory=Counter)
    bad_images: dict[str, str] = field(default_factory=dict)
    same_instance: float = 0.0

    def by_class(self) -> dict[str, list[int]]:
        """Class -> numbers of its regions, with classes in alphabetical order."""
        numbers: dict[str, list[int]] = {}
        for number, region in enumerate(self.regions):
            numbers.setdefault(region.category, []).append(number)
        return dict(sorted(numbers.items()))

    def by_kind(self) -> dict[tuple[str, str], list[int]]:
        """Class and style -> numbers of the regions that examples can be drawn from."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for number, region in enumerate(self.regions):
            if region.role != "query":
                numbers.setdefault(region.kind, []).append(number)
        return numbers

    @property
    def queries(self) -> list[int]:
        """Numbers of the regions that can be queries."""
        return [n for n, region in enumerate(self.regions) if region.role != "example"]

    def count_classes_without_a_region(self, asked: Iterable[str] | None) -> None:
        """Count the classes that a recipe names but the source lacks."""
        unseen = set(asked or ()) - {region.category for region in self.regions}
        self.skipped["classes_without_a_region"] += len(unseen)

    def drop_small_classes(self, images: int) -> None:
        """Leave out each class and style that has no query with examples from `images` - 1 other
        images. A class counts once for each such style.
        """
        shown: dict[tuple[str, str], set[str]] = {}
        asked: dict[tuple[str, str], set[str]] = {}
        for region in self.regions:
            for names, other in ((shown, "query"), (asked, "example")):
                of_kind = names.setdefault(region.kind, set())
                if region.role != other:
                    of_kind.add(region.photograph)
        small = {
            kind
            for kind, names in shown.items()
            if not asked[kind] or len(names) < images - names.isdisjoint(asked[kind])
        }
        if small:
            self.regions = [region for region in self.regions if region.kind not in small]
            self.skipped["classes_with_too_few_images"] += len(small)

    def drop_classes(self, classes: set[str], reason: str) -> None:
        if classes:
            self.regions = [region for region in self.regions if region.category not in classes]
            self.skipped[reason] += len(classes)
