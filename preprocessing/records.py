"""Checks of single values in the records of COCO's and Visual Genome's files, and of their kin."""

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from icl_moe.errors import InputError, shown
from icl_moe.inputs import is_inside
from preprocessing.crops import PixelRect
from preprocessing.image_check import is_file
from preprocessing.pool import ImageFile

_LARGEST_NUMBER = 1e9
"""The largest side or coordinate in pixels: far beyond any image, and safe in arithmetic."""


_ROUNDING = 1.0
"""How far in pixels a box may reach past the edge of its image, as many do by one."""


def is_id(value: Any) -> bool:
    """Whether a record may have `value` as its id: a whole number (1.0 too), or text."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of pixels: finite and not too large."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
    )


def kinds_of_id(ids: Any, other: Any) -> str:
    """An addition to the message that the id `other` is not among `ids`, for the case that one is
    text and the others are numbers; otherwise ''.
    """
    one = next(iter(ids), other)
    if isinstance(one, str) == isinstance(other, str):
        return ""
    ours, theirs = ("text", "numbers") if isinstance(other, str) else ("a number", "text")
    return f" (it is {ours}, and the ids there are {theirs})"


def read_rect(
    values: list[Any], image: ImageFile, where: str, skipped: Counter[str]
) -> PixelRect | None:
    """The x, y, width and height of a record. If width or height is negative, counts it and returns
    None.

    Data sets have a few such boxes, whose annotator did not begin at the top left corner. A box
    that reaches past an edge of the image by more than rounding is counted; `normalise_box` clips
    it. Raises InputError for anything but four numbers.
    """
    if len(values) != 4 or not all(map(is_number, values)):
        raise InputError(
            f"{where} has the box {shown(values)}; it must be x, y, width and height in pixels."
        )
    x, y, width, height = map(float, values)
    if width < 0 or height < 0:
        skipped["boxes_of_negative_size"] += 1
        return None
    past = max(-x, -y, x + width - image.width, y + height - image.height)
    skipped["boxes_clipped_to_the_image"] += past > _ROUNDING
    return x, y, width, height


def image_file(folder: Path, name: Any, width: Any, height: Any, where: str) -> ImageFile:
    """The image of a record, after checks; `where` names the record in error messages.

    Raises InputError if the name leads out of the folder or the size is not two positive whole
    numbers.
    """
    if not isinstance(name, str) or not is_inside(name):
        raise InputError(
            f"{where} has the file name {shown(name)}; it must be a path inside the images' folder."
        )
    if not all(is_number(side) and side >= 1 and side == int(side) for side in (width, height)):
        raise InputError(
            f"{where} has the size {shown(width)} x {shown(height)}; both must be positive whole "
            "numbers."
        )
    plain = str(PurePosixPath(name))
    return ImageFile(folder / plain, plain, int(width), int(height))


def local_name(folder: Path, name: Any) -> Any:
    """The path within the folder of images of a file that a tool's record names, if that is in one
    of the forms of labelling tools and the file exists there; otherwise the name itself.

    Windows tools write backslashes. Label Studio writes the path in its own storage, with the
    project's number, or a URL, and puts eight hexadecimal digits before the name of an upload. Many
    tools write the path from the folder of the annotations, which contains that of the images.
    """
    if not isinstance(name, str) or not _UNUSUAL.search(name) or "\0" in name:
        return name
    slashed = name.replace("\\", "/")
    forms = [name, slashed]
    if folder.name and slashed.startswith(f"{folder.name}/"):
        forms.append(slashed.removeprefix(f"{folder.name}/"))
    if _STORED.search(slashed):
        last = unquote(slashed.partition("?d=")[2] or slashed).rpartition("/")[2]
        forms += [f"images/{last}", last]
    forms += [_UPLOADED.sub(r"\1\2", form) for form in forms]
    for form in forms:
        if is_inside(form) and is_file(folder / form):
            return form
    return slashed if is_inside(slashed) else name


_UNUSUAL = re.compile(r"[\\/]|^[0-9a-f]{8}-")
_STORED = re.compile(r"(^|/)(upload|images)/\d+/[^/]+$|^https?://|(^|/)data/local-files/|\?d=")
_UPLOADED = re.compile(r"^(|.*/)[0-9a-f]{8}-([^/]+)$")

_AUGMENTED = re.compile(r"(.+)\.rf\.[0-9A-Za-z]{16,}\.\w+")


def unaugmented(name: str) -> str:
    """What the augmented copies of an image have in common, if its name is that of an image in an
    export of Roboflow (photo_jpg.rf.0123456789abcdef0123456789abcdef.jpg); otherwise "".
    """
    match = _AUGMENTED.fullmatch(name)
    return match[1] if match else ""
