"""The pool: what every source becomes, regions of one class each, from which episodes are drawn."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from icl_moe.boxes import Box
from icl_moe.errors import InputError
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


@dataclass(frozen=True, slots=True)
class Region:
    """One pair in waiting: an image, the class it shows, and the mask or the caption that belongs
    to it.

    crop: the part of the image that the model sees, stretched to image_size x image_size.
    scale: area of the object / area of the crop.
    mask: of segmentation, the class's mask in the crop at image_size, COCO's compressed run
    lengths.
    box, caption, references: of captioning; the box in fractions of the crop, the text, and all
    texts that a prediction is measured against. annotations: ids in the source.
    """

    image: ImageFile
    category: str
    annotations: tuple[int, ...]
    crop: PixelBox
    scale: float
    mask: bytes | None = None
    box: Box | None = None
    caption: str | None = None
    references: tuple[str, ...] = ()


@dataclass
class Pool:
    """The regions of one task in the order of their source, and how many things were left out, by
    reason.
    """

    task: str
    regions: list[Region]
    skipped: Counter[str] = field(default_factory=Counter)

    def by_class(self) -> dict[str, list[int]]:
        """Class -> numbers of its regions, classes in alphabetical order."""
        numbers: dict[str, list[int]] = {}
        for number, region in enumerate(self.regions):
            numbers.setdefault(region.category, []).append(number)
        return dict(sorted(numbers.items()))

    def drop_small_classes(self, images: int) -> None:
        """Leave out classes that are seen in fewer than `images` different images: no episode can
        be made of them.
        """
        seen: dict[str, set[str]] = {}
        for region in self.regions:
            seen.setdefault(region.category, set()).add(region.image.name)
        self.drop_classes(
            {category for category, names in seen.items() if len(names) < images},
            "classes_with_too_few_images",
        )

    def drop_classes(self, classes: set[str], reason: str) -> None:
        if classes:
            self.regions = [region for region in self.regions if region.category not in classes]
            self.skipped[reason] += len(classes)


class HasImage(Protocol):
    """Anything that stands on an image file."""

    @property
    def image(self) -> ImageFile: ...


Item = TypeVar("Item", bound=HasImage)


def keep_present(
    items: Iterable[Item],
    folder: Path,
    missing_images: Literal["stop", "skip"],
    skipped: Counter[str],
) -> list[Item]:
    """The items whose image file is there.

    Missing files raise an InputError that counts them, or with `skip` are counted in `skipped`.
    """
    items = list(items)
    files = {item.image.name: item.image for item in items}
    missing = {name for name, file in files.items() if not file.path.is_file()}
    if not missing:
        return items
    if missing_images == "stop":
        raise InputError(
            f"{len(missing)} of {len(files)} annotated images are missing from {folder}, the first "
            f"is {min(missing)}; "
            "put them there, or set missing_images=skip."
        )
    skipped["missing_images"] += len(missing)
    return [item for item in items if item.image.name not in missing]


def image_file(folder: Path, name: object, width: object, height: object, where: str) -> ImageFile:
    """The image of a record, checked; `where` names the record in error messages.

    Raises InputError for a name that leaves the folder and for a size that is not two positive
    whole numbers.
    """
    if (
        not isinstance(name, str)
        or not name
        or Path(name).is_absolute()
        or ".." in Path(name).parts
    ):
        raise InputError(
            f"{where} has the file name {name!r}; a path inside the images' folder belongs there."
        )
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise InputError(
            f"{where} has the size {width!r} x {height!r}; positive whole numbers belong there."
        )
    return ImageFile(folder / name, name, width, height)
