"""The pool: the common form of every source, a list of regions of one class each, from which
episodes are drawn.
"""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
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

ROLES: tuple[Role, ...] = get_args(Role)


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
    def is_absent(self) -> bool:
        """Whether the image lacks the class, see preprocessing/absent.py."""
        return self.scale == 0 and not self.annotations

    @property
    def kind(self) -> tuple[str, str]:
        """Class and style, which all regions of an episode share."""
        return self.category, self.style


class RegionKeys(NamedTuple):
    """What episodes are drawn by, as numbers of each region, int64 (regions,): two regions have the
    same number if they have the same value. names: the name of each class and style.
    """

    names: Sequence[str]
    categories: np.ndarray
    styles: np.ndarray
    photographs: np.ndarray
    roles: np.ndarray

    @property
    def kinds(self) -> np.ndarray:
        """Class and style in one number."""
        return self.categories * len(self.names) + self.styles


class StoredRegions(Sequence[PoolRegion]):
    """Regions that are kept in a compact form, and made when they are asked for."""

    @abstractmethod
    def keys(self) -> RegionKeys: ...

    @abstractmethod
    def select(self, numbers: np.ndarray) -> "StoredRegions":
        """The regions with these numbers, or the regions that a boolean array marks."""


def region_keys(regions: Sequence[PoolRegion]) -> RegionKeys:
    """The keys of regions in either form."""
    if isinstance(regions, StoredRegions):
        return regions.keys()
    numbers: dict[str, int] = {}
    photographs: dict[str, int] = {}
    found = [
        (
            numbers.setdefault(region.category, len(numbers)),
            numbers.setdefault(region.style, len(numbers)),
            photographs.setdefault(region.photograph, len(photographs)),
            ROLES.index(region.role),
        )
        for region in regions
    ]
    columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return RegionKeys(list(numbers), *columns)


def groups_of(values: np.ndarray) -> dict[int, np.ndarray]:
    """Value -> the places where it stands, in ascending order."""
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, first[1:]), strict=True)) if len(values) else {}


@dataclass
class Pool:
    """The regions of one task in the order of their source. skipped: reason -> how many things were
    left out. bad_images: name -> why the image could not be used. same_instance: the share of
    episodes whose regions all show one object in several images. absent: how many regions were made
    of classes that their image lacks.
    """

    task: str
    regions: Sequence[PoolRegion]
    skipped: Counter[str] = field(default_factory=Counter)
    bad_images: dict[str, str] = field(default_factory=dict)
    same_instance: float = 0.0
    absent: int = 0

    def by_kind(self) -> dict[tuple[str, str], list[int]]:
        """Class and style -> numbers of the regions that examples can be drawn from."""
        keys = region_keys(self.regions)
        examples = np.flatnonzero(keys.roles != ROLES.index("query"))
        found = {}
        for kind, places in groups_of(keys.kinds[examples]).items():
            category, style = divmod(kind, len(keys.names))
            found[keys.names[category], keys.names[style]] = examples[places].tolist()
        return found

    def keep(self, chosen: np.ndarray) -> None:
        """Keep only the regions that a boolean array (regions,) marks."""
        if chosen.all():
            return
        if isinstance(self.regions, StoredRegions):
            self.regions = self.regions.select(chosen)
        else:
            self.regions = [self.regions[number] for number in np.flatnonzero(chosen).tolist()]

    def count_classes_without_a_region(self, named: Iterable[str] | None) -> None:
        """Count the classes that a recipe names but the source lacks."""
        self.skipped["classes_without_a_region"] += len(
            set(named or ()) - self.class_counts().keys()
        )

    def class_counts(self) -> Counter[str]:
        """Class -> how many regions it has."""
        keys = region_keys(self.regions)
        found, counts = np.unique(keys.categories, return_counts=True)
        names = [keys.names[number] for number in found.tolist()]
        return Counter(dict(zip(names, counts.tolist(), strict=True)))

    def drop_small_classes(self, images: int) -> None:
        """Leave out each class and style that has no query with examples from `images` - 1 other
        images. A class counts once for each such style.
        """
        if not len(self.regions):
            return
        keys = region_keys(self.regions)
        kinds, of_region = np.unique(keys.kinds, return_inverse=True)
        pairs = of_region * (int(keys.photographs.max()) + 1) + keys.photographs

        def photographs(pairs: np.ndarray) -> np.ndarray:
            """How many of these pairs of kind and photograph each kind has."""
            of_kind = pairs // (int(keys.photographs.max()) + 1)
            return np.bincount(of_kind, minlength=len(kinds))

        as_examples = np.unique(pairs[keys.roles != ROLES.index("query")])
        as_queries = np.unique(pairs[keys.roles != ROLES.index("example")])
        both = photographs(np.intersect1d(as_examples, as_queries, assume_unique=True)) > 0
        small = (photographs(as_queries) == 0) | (photographs(as_examples) < images - ~both)
        self.keep(~small[of_region])
        self.skipped["classes_with_too_few_images"] += int(small.sum())

    def drop_classes(self, classes: set[str], reason: str) -> None:
        if classes and len(self.regions):
            keys = region_keys(self.regions)
            dropped = np.array([name in classes for name in keys.names], dtype=bool)
            self.keep(~dropped[keys.categories])
            self.skipped[reason] += len(classes)
