"""What the readers of COCO's and Visual Genome's files ask of single values in a record."""

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from icl_moe.errors import InputError, shown
from preprocessing.crops import PixelRect
from preprocessing.pool import ImageFile

_LARGEST_NUMBER = 1e9
"""Of sides and coordinates in pixels: far beyond any image, and safe to calculate with."""


def is_id(value: Any) -> bool:
    """Whether a record may have `value` as its id: a whole number (1.0 too), or text."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of pixels; NaN, infinities and the like are none."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
    )


def kinds_of_id(ids: Any, other: Any) -> str:
    """What to add to a message that the id `other` is not among `ids`: '' unless one is text and
    the others are numbers.
    """
    one = next(iter(ids), other)
    if isinstance(one, str) == isinstance(other, str):
        return ""
    ours, theirs = ("text", "numbers") if isinstance(other, str) else ("a number", "text")
    return f" (it is {ours}, and the ids there are {theirs})"


def read_rect(values: list[Any], where: str, skipped: Counter[str]) -> PixelRect | None:
    """The x, y, width and height of a record; None, and counted, where width or height is negative.

    Data sets have a few such boxes, dragged from another corner than the first. Raises InputError
    for anything else than four numbers.
    """
    if len(values) != 4 or not all(map(is_number, values)):
        raise InputError(
            f"{where} has the box {shown(values)}; x, y, width and height in pixels belong there."
        )
    x, y, width, height = map(float, values)
    if width < 0 or height < 0:
        skipped["boxes_of_negative_size"] += 1
        return None
    return x, y, width, height


def image_file(folder: Path, name: Any, width: Any, height: Any, where: str) -> ImageFile:
    """The image of a record, checked; `where` names the record in error messages.

    Raises InputError for a name that leaves the folder and for a size that is not two positive
    whole numbers.
    """
    if not isinstance(name, str) or not is_inside(name):
        raise InputError(
            f"{where} has the file name {shown(name)}; a path inside the images' folder belongs "
            "there."
        )
    if not all(is_number(side) and side >= 1 and side == int(side) for side in (width, height)):
        raise InputError(
            f"{where} has the size {shown(width)} x {shown(height)}; positive whole numbers belong "
            "there."
        )
    plain = str(PurePosixPath(name))
    return ImageFile(folder / plain, plain, int(width), int(height))


def is_inside(name: str) -> bool:
    """Whether a file name is a path that stays within its folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    )
