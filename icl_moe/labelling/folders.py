"""Folders of images: those to label, and the examples."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from icl_moe.errors import InputError
from icl_moe.outputs import output_file

ExampleFiles = Mapping[str, Sequence[tuple[Path, Path]]]
"""(image, mask) files by the name of their class."""

_PARTS = ("images", "masks")
_UNNAMED = "object"
"""The class of examples without a name."""

_PHOTOGRAPHS_OF_PHONES = (".heic", ".heif")
"""The endings of photographs that Pillow does not read. These files count as images, so that they
are named among the images that cannot be read and are not silently left out.
"""


def find_images(folder: Path, examples: ExampleFiles) -> list[str]:
    """The images in a folder and its subfolders, as sorted paths below it with /.

    Hidden files, files whose names are not those of images, and the masks of the examples are left
    out. Raises InputError if there are no images.
    """
    _check_folder(folder)
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if _is_called_like_an_image(path) and path.is_file()
    ]
    masks = {os.path.realpath(mask) for pairs in examples.values() for _, mask in pairs}
    names = sorted(
        path.as_posix()
        for path in found
        if not any(part.startswith(".") for part in path.parts)
        and os.path.realpath(folder / path) not in masks
    )
    if not names:
        raise InputError(f"{folder} holds no images, such as .jpg or .png files.")
    return names


def find_examples(folder: Path, category: str | None = None) -> ExampleFiles:
    """The examples in FOLDER/images and FOLDER/masks, whose files have equal names but for the
    ending; or those in FOLDER/CLASS/images and FOLDER/CLASS/masks of each class.

    category: the name of the class, if there is one only. Raises InputError if an image lacks its
    mask, or a mask its image, and if there are no examples.
    """
    _check_folder(folder)
    if are_of_one_class(folder):
        return {category or _UNNAMED: _pairs(folder)}
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not classes:
        raise InputError(
            f"{folder} holds no examples: it must have the folders images and masks, or a folder "
            "for each class that has these two."
        )
    if category is not None:
        raise InputError(
            f"{folder} has a folder for each class, which names it: leave --category out."
        )
    return {path.name: _pairs(path) for path in classes}


def are_of_one_class(folder: Path) -> bool:
    """Whether a folder of examples has no folder for each class, so that nothing names theirs."""
    return any((folder / part).is_dir() for part in _PARTS)


def label_output(path: str, suffix: str, images: Path) -> Path:
    """The file to write, as `output_file` approves it. Raises InputError also if it lies among the
    images.
    """
    file = output_file(path, [suffix])
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is not a file; it must be one, since it is written in pieces.")
    if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(images)):
        raise InputError(f"{file} lies in the folder of images, {images}; choose another place.")
    return file


def digest_of(examples: ExampleFiles) -> str:
    """16 hexadecimal digits of a SHA-256 over the examples' classes, names and contents."""
    digest = hashlib.sha256()
    for name, pairs in examples.items():
        for path in (path for pair in pairs for path in pair):
            try:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"The file {path} cannot be read: {error.strerror}.") from error
            digest.update(f"{name}/{path.name} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise InputError(
                f"{folder} lacks the folder {part}: examples are files of equal names in images "
                "and masks."
            )
    images, masks = (_by_stem(folder / part) for part in _PARTS)
    for has, lacks, what, other in (
        (images, masks, "image", "mask"),
        (masks, images, "mask", "image"),
    ):
        if alone := sorted(has.keys() - lacks.keys()):
            raise InputError(
                f"The {what} {has[alone[0]]} has no {other}: {folder / (other + 's')} must hold a "
                f"file of the same name but for the ending, such as {alone[0]}.png."
            )
    if not images:
        raise InputError(f"{folder / 'images'} holds no images, such as .jpg or .png files.")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not _is_called_like_an_image(path) or not path.is_file():
            continue
        if path.stem in found:
            raise InputError(
                f"{found[path.stem]} and {path} have equal names but for the ending, so that it is "
                "not clear which one is meant."
            )
        found[path.stem] = path
    return found


def _is_called_like_an_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in Image.registered_extensions() or suffix in _PHOTOGRAPHS_OF_PHONES


def _check_folder(folder: Path) -> None:
    try:
        if folder.is_dir():
            return
        exists = folder.exists()
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    if exists:
        raise InputError(f"{folder} is not a folder; it must be one.")
    raise InputError(f"The folder {folder} does not exist.")
