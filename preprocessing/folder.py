"""A folder of images and a folder of masks -> the segmentation pool.

An image and its mask have the same path within their folders, except for the ending (and a suffix
of the mask such as `_mask`). Without a names file a mask marks one object in white on black: its
class is the first folder of its path if the image is not there too, otherwise the only one of
`segmentation.classes`, otherwise "object". With a names file (labels.py) a mask holds a class in
each pixel, as ids or as colours.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from icl_moe.errors import InputError, shown
from icl_moe.images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    EmptyMaskError,
    SeveralLevelsError,
    colour_codes,
    colours_of,
    commonest,
    load_colours,
    load_labels,
    load_mask,
)
from icl_moe.inputs import check_inside
from icl_moe.rle import encode_rle
from preprocessing.coco import CheckedCOCO, index_records, read_instances
from preprocessing.image_check import UsableImages
from preprocessing.labels import VOID, LabelTable, read_labels
from preprocessing.pool import Pool
from preprocessing.recipe import SegmentationSource
from preprocessing.workers import ordered_map

_CHUNK = 16

_Level = tuple[int, ...]
"""A level of grey or an id, or a colour."""

_PLAIN_LEVELS = {(1,), (255,)}
"""The levels of masks of one object as tools write them."""


def read_segmentation(
    source: SegmentationSource, image_size: int, usable: UsableImages, workers: int
) -> Pool:
    """The segmentation pool of a folder. Raises InputError if anything in it is wrong."""
    records, skipped = load_folder(source, workers)
    pool = read_instances(records, source, image_size, usable, workers)
    pool.skipped += skipped
    return pool


def load_folder(source: SegmentationSource, workers: int) -> tuple[CheckedCOCO, Counter[str]]:
    """The masks of a folder as records in COCO's form, and what was left out, by reason.

    The id of an image is its name, that of an annotation the name of its mask (with names, also the
    class). Raises InputError if a mask cannot be read, is in another form, or has the image's name
    of another mask.
    """
    images, masks = source.path("images"), source.path("masks")
    table = read_labels(Path(source.names)) if source.names is not None else None
    skipped: Counter[str] = Counter()
    found = _matched(images, masks, table, _only_class(source), skipped)
    folder = _Folders(images, masks, table)
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    names = table.classes if table else dict.fromkeys(mask.category for mask in found)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    content["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    sizes: dict[str, tuple[int, int]] = {}
    levels: dict[str, dict[_Level, str]] = {}
    chunks = [found[start : start + _CHUNK] for start in range(0, len(found), _CHUNK)]
    with tqdm(total=len(found), desc="reading masks", unit="mask") as progress:
        for read in ordered_map(_read_masks, folder, chunks, workers):
            for mask, size, of_class, level in read:
                _check_size(masks, mask, sizes.setdefault(mask.image, size), size)
                if level is not None:
                    _check_level(masks, mask, level, levels.setdefault(mask.category, {}))
                skipped["masks_that_mark_nothing"] += not (of_class or source.absent)
                for category, rle in of_class.items():
                    content["annotations"].append(
                        {
                            "id": f"{mask.name}: {category}" if table else mask.name,
                            "image_id": mask.image,
                            "category_id": numbers[category],
                            "segmentation": rle,
                        }
                    )
            progress.update(len(read))
    content["images"] = [
        {"id": name, "file_name": name, "width": width, "height": height}
        for name, (width, height) in sizes.items()
    ]
    if not content["annotations"]:
        raise InputError(f"No mask in {masks} marks anything.")
    return index_records(masks, content), skipped


@dataclass(frozen=True, slots=True)
class _Mask:
    """A mask's file within the folder of masks, its image's within the folder of images, and its
    class; the latter is empty if a names file tells the class of each pixel.
    """

    name: str
    image: str
    category: str


def _only_class(source: SegmentationSource) -> str:
    """The class of masks that no folder names."""
    return source.classes[0] if source.classes and len(source.classes) == 1 else "object"


def _matched(
    images: Path, masks: Path, table: LabelTable | None, only: str, skipped: Counter[str]
) -> list[_Mask]:
    """The masks with their images, in the order of the images. Images without a mask are counted.

    A mask without an image gets its own path without the ending as the image's name, so that it is
    reported with the missing images.
    """
    by_stem = _by_stem(images, "segmentation.images")
    files = _files(masks, "segmentation.masks")
    if masks.resolve() == images.resolve():  # as in Roboflow's exports
        files = [name for name in files if _suffix_of(name)]
        by_stem = {stem: name for stem, name in by_stem.items() if not _suffix_of(name)}
    found: dict[tuple[str, str], _Mask] = {}
    for name in files:
        mask = _match(name, by_stem, table is None, only)
        other = found.setdefault((mask.image, mask.category), mask)
        if other is not mask:
            raise InputError(
                f"{masks}: {other.name} and {name} are both masks of {mask.image}; an image may "
                "have one mask of a class."
            )
    known = set(by_stem.values())
    if not any(mask.image in known for mask in found.values()):
        raise InputError(
            f"No mask in {masks} has the name of an image in {images}, except for the ending; "
            + (
                f"the first mask is {files[0]}."
                if files
                else "there is no mask, such as a .png file."
            )
        )
    skipped["images_without_a_mask"] += len(known - {mask.image for mask in found.values()})
    return sorted(found.values(), key=lambda mask: (mask.image, mask.category))


def _match(name: str, by_stem: dict[str, str], has_class: bool, only: str) -> _Mask:
    """A mask and its image. The image has the same path as the mask, or the same path without its
    first folder, which is the class.
    """
    path = _stem(name)
    plain = path.removesuffix(_suffix_of(name)) if _suffix_of(name) else path
    for stem in (path, plain):
        if stem in by_stem:
            return _Mask(name, by_stem[stem], only if has_class else "")
    for stem in (path, plain):
        category, separator, rest = stem.partition("/")
        if has_class and separator and rest in by_stem:
            return _Mask(name, by_stem[rest], category)
    return _Mask(name, plain, only if has_class else "")


def _suffix_of(name: str) -> str:
    """The suffix that marks a file as a mask; empty if it has none."""
    stem = _stem(name)
    return next((suffix for suffix in MASK_SUFFIXES if stem.endswith(suffix)), "")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _by_stem(folder: Path, key: str) -> dict[str, str]:
    """Path without the ending -> path, for the images of a folder."""
    found: dict[str, str] = {}
    for name in _files(folder, key):
        other = found.setdefault(_stem(name), name)
        if other != name:
            raise InputError(
                f"{folder}: {other} and {name} differ only in their ending, so it is not clear "
                "which of them a mask belongs to; remove one."
            )
    return found


def _files(folder: Path, key: str) -> list[str]:
    """The images in a folder and its subfolders, as sorted paths within it. Hidden files, such as
    those of macOS (._name), are left out. Raises InputError for names that are not UTF-8.
    """
    if not folder.is_dir():
        raise InputError(f"{key}: the folder {folder} does not exist.")
    names = [
        path.relative_to(folder).as_posix()
        for path in _walk(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{folder} has a file whose name is not UTF-8, {shown(os.fsencode(name))}; rename "
                "it."
            ) from error
    return sorted(names)


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _check_size(masks: Path, mask: _Mask, first: tuple[int, int], size: tuple[int, int]) -> None:
    if size != first:
        raise InputError(
            f"{masks / mask.name} has {size[0]} x {size[1]} pixels, but another mask of "
            f"{mask.image} has {first[0]} x {first[1]}."
        )


def _check_level(masks: Path, mask: _Mask, level: _Level, files: dict[_Level, str]) -> None:
    """Raise InputError if the masks of a class mark with different levels, as masks of ids or
    colours do in which each shows another class. files: a file of each level that was seen before.
    """
    files.setdefault(level, mask.name)
    if len(files) > 1 and not files.keys() <= _PLAIN_LEVELS:
        (one, first), (other, second) = list(files.items())[:2]
        raise InputError(
            f"{masks}: {first} marks with the level {_shown_level(one)}, but {second} with "
            f"{_shown_level(other)}. If levels or colours stand for classes, set "
            "segmentation.names to the file that names them; otherwise make all masks white on "
            "black."
        )


def _shown_level(level: _Level) -> str:
    return str(level[0]) if len(level) == 1 else str(level)


# --- Reading masks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folders:
    images: Path
    masks: Path
    table: LabelTable | None


_Read = tuple[_Mask, tuple[int, int], dict[str, dict[str, Any]], _Level | None]
"""A mask, its width and height, class -> run lengths, and the level of a mask of one object."""


def _read_masks(folders: _Folders, wanted: list[_Mask]) -> list[_Read]:
    return [_read_mask(folders, mask) for mask in wanted]


def _read_mask(folders: _Folders, mask: _Mask) -> _Read:
    file = folders.masks / mask.name
    check_inside(folders.masks, file)
    level = None
    if folders.table is None:
        of_class = {mask.category: _of_object(file)}
        level = _level_of(file, of_class[mask.category])
    elif folders.table.colours:
        of_class = _of_colours(file, folders.table)
    else:
        of_class = _of_ids(file, folders.table)
    height, width = next(iter(of_class.values())).shape
    _check_fits(file, (width, height), folders.images / mask.image)
    marked = {name: encode_rle(mask_HW) for name, mask_HW in of_class.items() if mask_HW.any()}
    return mask, (width, height), marked, level


def _check_fits(mask: Path, size: tuple[int, int], image: Path) -> None:
    """Raise InputError if the mask has not the size of its image, upright or as stored."""
    try:
        with Image.open(image) as opened:
            found = opened.size
    except Exception:  # Pillow's readers raise many kinds; the check of the images reports them.
        return
    if size not in (found, found[::-1]):
        raise InputError(
            f"The mask {mask} has {size[0]} x {size[1]} pixels, but its image {image} has "
            f"{found[0]} x {found[1]}."
        )


def _of_object(file: Path) -> np.ndarray:
    """The mask (H, W) of one object, which may be empty."""
    try:
        return load_mask(file, None)
    except EmptyMaskError:
        return np.zeros(load_labels(file).shape[:2], dtype=bool)
    except SeveralLevelsError as error:
        raise InputError(
            f"{str(error).rstrip('.')}; for ids or colours of classes set segmentation.names to "
            "the file that names them."
        ) from error


def _level_of(file: Path, mask_HW: np.ndarray) -> _Level | None:
    """The commonest level or colour of the pixels that a mask marks, of a palette the colour. None
    where it is not exact or does not matter: in lossy formats and transparent pictures, and for
    empty masks. Of a large mask only some pixels are checked.
    """
    with Image.open(file) as opened:
        has_palette, is_plain = opened.mode == "P", opened.mode in ("1", "L", "I", "I;16", "RGB")
        is_lossy = opened.format in ("JPEG", "WEBP") or "transparency" in opened.info
    if is_lossy or not (has_palette or is_plain):
        return None
    levels_HW = load_colours(file) if has_palette else load_labels(file)
    if not mask_HW.any() or levels_HW.shape[:2] != mask_HW.shape:
        return None
    marked_N = levels_HW[mask_HW][:: max(1, mask_HW.size // 1_000_000)]
    if marked_N.ndim == 1:
        level: _Level = (int(commonest(marked_N)),)
    else:
        level = _colour(int(commonest(colour_codes(marked_N))))
        level = level[:1] if len(set(level)) == 1 else level
    is_white = level == (65535,) or all(240 <= each <= 255 for each in level)
    return (255,) if is_white else level


def _of_ids(file: Path, table: LabelTable) -> dict[str, np.ndarray]:
    """Class -> mask (H, W) of a mask that holds ids. If only one class is named, a mask may also be
    white on black.
    """
    ids_HW = load_labels(file)
    if ids_HW.ndim == 3:
        raise InputError(
            f"The mask {file} has colours, but {table.file} names ids; give the colour of each "
            "class there."
        )
    present = np.unique(ids_HW).tolist()
    known = {0: None, VOID: None, **table.ids}
    classes = [name for name in table.ids.values() if name is not None]
    if len(classes) == 1 and present == [0, VOID] and known[VOID] is None:
        return {classes[0]: ids_HW == VOID}
    unknown = [number for number in present if number not in known]
    if unknown:
        raise InputError(
            f"The mask {file} has the id {unknown[0]}, which {table.file} does not name"
            f"{_lossy(file, len(unknown))}."
        )
    masks = {name: np.zeros(ids_HW.shape, dtype=bool) for name in classes}
    for number in present:
        if (name := known[number]) is not None:
            masks[name] |= ids_HW == number
    return masks


def _of_colours(file: Path, table: LabelTable) -> dict[str, np.ndarray]:
    """Class -> mask (H, W) of a mask that holds colours. Black is the background unless named."""
    codes_HW = colour_codes(load_colours(file))
    codes = colour_codes(np.array(list(table.colours))).tolist()
    known = {0: None, **dict(zip(codes, table.colours.values(), strict=True))}
    present = np.unique(codes_HW).tolist()
    unknown = [code for code in present if code not in known]
    if unknown:
        colour = _colour(unknown[0])
        raise InputError(
            f"The mask {file} has the colour {colour}, which {table.file} does not name"
            f"{_lossy(file, len(unknown))}."
        )
    masks = {name: np.zeros(codes_HW.shape, dtype=bool) for name in table.classes}
    for code in present:
        if (name := known[code]) is not None:
            masks[name] |= codes_HW == code
    return masks


def _colour(code: int) -> tuple[int, ...]:
    return tuple(colours_of(np.array(code)).tolist())


def _lossy(file: Path, unknown: int) -> str:
    """A hint for a message about `unknown` ids or colours."""
    if file.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        return "; JPEG changes ids and colours, so export masks as PNG"
    return f" (and {unknown - 1} more)" if unknown > 1 else ""
