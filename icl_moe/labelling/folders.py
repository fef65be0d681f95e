"""Folders of images: those to label, and the examples."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from icl_moe.errors import InputError
from icl_moe.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from icl_moe.messages import note
from icl_moe.outputs import output_file

ExampleFiles = Mapping[str, Sequence[tuple[Path, Path]]]
"""(image, mask) files by the name of their class."""

_PARTS = ("images", "masks")
_UNNAMED = "object"
"""The class of examples without a name."""


def find_images(folder: Path, examples: ExampleFiles) -> list[str]:
    """The images in a folder and in those within it, links included, as sorted paths below it with
    /.

    Hidden files and the masks of the examples are left out. Files whose ending is not an image's
    are left out too, and counted in a note. Raises InputError if there are no images.
    """
    _check_folder(folder)
    masks = {os.path.realpath(mask) for pairs in examples.values() for _, mask in pairs}
    names, others = [], Counter[str]()
    for path in _walk(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others[path.suffix.lower() or "no ending"] += 1
        elif os.path.realpath(path) not in masks:
            names.append(path.relative_to(folder).as_posix())
    if others:
        named = ", ".join(f"{count} of {ending}" for ending, count in sorted(others.items()))
        note(f"{folder}: files without the ending of an image are left out ({named})")
    if not names:
        raise InputError(f"{folder} holds no images, such as .jpg or .png files.")
    return sorted(names)


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those within it that are not hidden, and the links that lead
    nowhere. Links to folders are followed, each folder once; one that cannot be read is named.
    """

    def tell(error: OSError) -> None:
        note(f"skipped: the folder {error.filename} cannot be read ({error.strerror})")

    seen = set[str]()
    for place, folders, files in os.walk(folder, onerror=tell, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.is_file() or not path.exists():
                yield path


def find_examples(folder: Path, category: str | None = None) -> ExampleFiles:
    """The examples in FOLDER/images and FOLDER/masks, whose files have equal names except for the
    ending (and a suffix of the mask such as `_mask`). Of several classes, they are in
    FOLDER/CLASS/images and FOLDER/CLASS/masks of each class, or the masks in FOLDER/masks/CLASS.

    category: the name of the class, if there is only one. Raises InputError if an image lacks its
    mask, or a mask its image, and if there are no examples.
    """
    _check_folder(folder)
    classes = [path for path in _folders_in(folder) if path.name not in _PARTS]
    if are_of_one_class(folder) or _class_masks(folder):
        if named := [path.name for path in classes if are_of_one_class(path)]:
            raise InputError(
                f"{folder} has the folders images and masks, and also a folder with these two for "
                f"the class {named[0]}; keep one of the two forms."
            )
    elif not classes:
        raise InputError(
            f"{folder} holds no examples: it must have the folders images and masks, or a folder "
            "for each class that has these two."
        )
    if are_of_one_class(folder):
        return {category or _UNNAMED: _pairs(folder / "images", folder / "masks")}
    if category is not None:
        raise InputError(
            f"{folder} has a folder for each class, which names it: leave --category out."
        )
    if of_classes := _class_masks(folder):
        return _pairs_by_class(folder / "images", of_classes)
    return {path.name: _pairs(path / "images", path / "masks") for path in classes}


def are_of_one_class(folder: Path) -> bool:
    """Whether a folder of examples has no folder for each class, so that nothing names their
    class.
    """
    return any((folder / part).is_dir() for part in _PARTS) and not _class_masks(folder)


def _class_masks(folder: Path) -> list[Path]:
    """The folders of masks for each class in FOLDER/masks."""
    masks = folder / "masks"
    return _folders_in(masks) if masks.is_dir() else []


def _folders_in(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


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


def check_new(*files: Path) -> None:
    """Raise InputError for a file that exists, and may have been corrected by hand."""
    for file in files:
        if file.exists():
            raise InputError(
                f"{file} exists, and may have been corrected by hand; --overwrite replaces it."
            )


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


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """The pairs of two folders whose files belong together one by one."""
    found = _images_in(images, masks)
    of_images = _masks_of(found, images, masks)
    if alone := sorted(found.keys() - of_images.keys()):
        raise InputError(
            f"The image {found[alone[0]]} has no mask: {masks} must hold a file of the same name "
            f"but for the ending, such as {alone[0]}.png."
        )
    return [(found[stem], of_images[stem]) for stem in sorted(found)]


def _pairs_by_class(images: Path, of_classes: Sequence[Path]) -> ExampleFiles:
    """The pairs of a folder of images and a folder of masks for each class; an image may show
    several classes.
    """
    masks = of_classes[0].parent
    found = _images_in(images, masks)
    if loose := sorted(_by_stem(masks).values()):
        raise InputError(
            f"{masks} has folders for classes, such as {of_classes[0].name}, but {loose[0].name} "
            "is in none of them."
        )
    pairs, alone = {}, set(found)
    for folder in of_classes:
        of_images = _masks_of(found, images, folder)
        if not of_images:
            raise InputError(f"{folder} holds no masks, such as .png files.")
        pairs[folder.name] = [(found[stem], of_images[stem]) for stem in sorted(of_images)]
        alone -= of_images.keys()
    if alone:
        raise InputError(f"The image {found[min(alone)]} has no mask in any folder of {masks}.")
    return pairs


def _images_in(images: Path, masks: Path) -> dict[str, Path]:
    """The images of examples by their stems. Raises InputError if there are none."""
    for part in (images, masks):
        if not part.is_dir():
            raise InputError(
                f"{part.parent} lacks the folder {part.name}: examples are files of equal names in "
                "images and masks."
            )
    found = _by_stem(images)
    if not found and not _by_stem(masks):
        raise InputError(f"{images} holds no images, such as .jpg or .png files.")
    return found


def _masks_of(found: Mapping[str, Path], images: Path, masks: Path) -> dict[str, Path]:
    """The masks in a folder by the stems of their images. Raises InputError for a mask without an
    image, and for two masks of one.
    """
    of_images: dict[str, Path] = {}
    for stem, mask in _by_stem(masks).items():
        suffix = next((suffix for suffix in MASK_SUFFIXES if stem.endswith(suffix)), "")
        of_image = stem if stem in found else stem.removesuffix(suffix)
        if of_image not in found:
            raise InputError(
                f"The mask {mask} has no image: {images} must hold a file of the same name but for "
                f"the ending, such as {stem}.png."
            )
        if other := of_images.get(of_image):
            raise InputError(f"{other} and {mask} are both masks of {found[of_image]}; keep one.")
        of_images[of_image] = mask
    return of_images


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if (
            path.name.startswith(".")
            or path.suffix.lower() not in IMAGE_SUFFIXES
            or not path.is_file()
        ):
            continue
        if path.stem in found:
            raise InputError(
                f"{found[path.stem]} and {path} have equal names but for the ending, so that it is "
                "not clear which one is meant."
            )
        found[path.stem] = path
    return found


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
