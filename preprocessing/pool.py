"""The pool: what every source becomes, regions of one class each, from which episodes are drawn."""

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
    """An image as its record has it; `name` is its path within the images' folder, width and height
    are pixels.
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
"""Which places of an episode a region may take."""


@dataclass(frozen=True, slots=True)
class PoolRegion:
    """What one pair of an episode is made of: an image, the class that it shows, and what the task
    asks about it.

    annotations: ids in the source. crop: the part of the image that the model sees, stretched to
    image_size x image_size. scale: area of the object / area of the crop. target: what the pair's
    output says, in the task's own type (such as `icl_moe.tasks.segmentation.MaskTarget`). style: in
    what way the target describes, where a source has several; an episode is of one style.
    origin: of a composed image, the name of the photograph that the object was cut from. instance:
    which single object the target is of, where one object is seen in several images. provenance:
    where the parts of a composed target come from, plain JSON values for KEY.json. role: which
    places of an episode it may take.
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

    @property
    def photograph(self) -> str:
        """The name of the image that the object was photographed in: that of the region itself, but
        for compositions.
        """
        return self.origin or self.image.name

    @property
    def kind(self) -> tuple[str, str]:
        """What all regions of an episode share: class and style."""
        return self.category, self.style


@dataclass
class Pool:
    """The regions of one task in the order of their source, how many things were left out, by
    reason, and which images could not be used: name -> why. same_instance: the share of episodes
    that are of one object, seen in several images.
    """

    task: str
    regions: list[PoolRegion]
    skipped: Counter[str] = field(default_factory=Counter)
    bad_images: dict[str, str] = field(default_factory=dict)
    same_instance: float = 0.0

    def by_class(self) -> dict[str, list[int]]:
        """Class -> numbers of its regions, classes in alphabetical order."""
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
        """Count the classes that a recipe asks for by name and the source has nothing of."""
        unseen = set(asked or ()) - {region.category for region in self.regions}
        self.skipped["classes_without_a_region"] += len(unseen)

    def drop_small_classes(self, images: int) -> None:
        """Leave out classes of which, in a style, no query can be asked with examples from `images`
        - 1 other images. Counts a class once for each style in which that is so.
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
