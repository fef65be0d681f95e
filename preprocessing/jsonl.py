"""Lines of JSON -> the pools of both tasks: one object of an image a line.

    {"image": "a.jpg", "class": "dog", "caption": "a dog on grass", "box": [8, 20, 300, 180],
     "mask": "a_dog.png"}

image: a path in the folder of images. class: its name (`category` is taken too). caption and box
(x, y, width, height in pixels) are for captioning; without a box, the mask's is taken. mask is for
segmentation: a file in the folder of masks, white on black, or COCO's polygons or run lengths. A
line may have a `style` (see instance_captions.py) and `width` and `height` of its image, which are
otherwise read from the file. Other keys are ignored. All lines of an image and a class together
make its class mask. In messages and in KEY.json the id of an annotation is the number of its line.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from icl_moe.boxes import Box, normalise_box
from icl_moe.errors import InputError, shown
from icl_moe.images import UNTURNED, EmptyMaskError, load_mask
from icl_moe.inputs import (
    JSONDecoder,
    check_inside,
    check_is_file,
    is_inside,
    json_encoding,
    json_error,
    other_kind_of,
    with_whole_characters,
)
from icl_moe.rle import encode_rle
from preprocessing.caption_regions import (
    caption_region,
    clean_phrase,
    drop_rare_classes,
    with_objects,
)
from preprocessing.coco import (
    CheckedCOCO,
    check_classes,
    coco_image,
    index_records,
    instance_rle,
    read_instances,
)
from preprocessing.image_check import UsableImages
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import CaptioningSource, SegmentationSource
from preprocessing.records import image_file, read_rect
from preprocessing.workers import ordered_map

_LONGEST_LINE = 100_000_000
_CHUNK = 16


def read_segmentation(
    source: SegmentationSource, image_size: int, usable: UsableImages, workers: int
) -> Pool:
    """The segmentation pool of the lines that have a mask. Raises InputError if one is wrong."""
    images = source.path("images")
    lines, found = read_lines(source.path("annotations"), images), Pool("segmentation", [])
    masked = [line for line in lines.records if line["segmentation"] is not None]
    found.skipped["lines_without_a_mask"] += len(lines.records) - len(masked)
    masked = _on_usable_images(lines, masked, images, usable, found)
    records = _records(lines, _with_masks(lines, masked, _masks_of(source), workers))
    pool = read_instances(records, source, image_size, usable, workers)
    pool.skipped += found.skipped
    pool.bad_images |= found.bad_images
    return pool


def read_captioning(source: CaptioningSource, usable: UsableImages) -> Pool:
    """The captioning pool of the lines that have a caption. Raises InputError if one is wrong, or
    if the lines lack a class of the recipe.
    """
    images = source.path("images")
    lines, pool = read_lines(source.path("annotations"), images), Pool("captioning", [])
    captioned = [line for line in lines.records if clean_phrase(line["caption"])]
    pool.skipped["lines_without_a_caption"] += len(lines.records) - len(captioned)
    captioned = _on_usable_images(lines, captioned, images, usable, pool)
    boxless = [line for line in captioned if line["bbox"] is None]
    _with_masks(lines, boxless, _masks_of(source), workers=0)
    coco = _records(lines, captioned)
    if source.classes is not None:
        check_classes("captioning.classes", set(source.classes), coco)
    pool.regions = with_objects(_regions(coco, source, pool))
    pool.count_classes_without_a_region(source.classes)
    drop_rare_classes(pool, source.min_descriptions)
    return pool


# --- Lines ---------------------------------------------------------------------------------------


@dataclass
class Lines:
    """The lines of a file as annotations in COCO's form, and the images and classes they name."""

    file: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, ImageFile] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    def where(self, record: dict[str, Any]) -> str:
        return f"{self.file}, line {record['id']}"


def read_lines(file: Path, images: Path) -> Lines:
    """Read and check a file of lines. Raises InputError if a line is not such a record."""
    lines = Lines(file)
    for number, values in tqdm(_objects(file), desc=file.name, unit="line"):
        where = f"{file}, line {number}"
        category = values.get("class", values.get("category"))
        if not isinstance(category, str) or not category.strip():
            raise InputError(f"{where} has the class {shown(category)}; it must be text.")
        caption, style = values.get("caption"), values.get("style")
        if not isinstance(caption, str | None) or not isinstance(style, str | None):
            raise InputError(f"{where}: caption and style must be text.")
        mask = values.get("mask")
        if not isinstance(mask, str | list | dict | None):
            raise InputError(
                f"{where} has the mask {shown(mask)}; it must be a file, polygons or run lengths."
            )
        image = _image(lines, images, values, where)
        lines.records.append(
            {
                "id": number,
                "image_id": image.name,
                "category_id": lines.classes.setdefault(category.strip(), len(lines.classes) + 1),
                "caption": caption,
                "style": (style or "").strip(),
                "bbox": values.get("box"),
                "segmentation": mask,
            }
        )
    if not lines.records:
        raise InputError(f"{file} is empty; it must have a JSON object a line.")
    return lines


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the object of each line that is not blank, one in memory at a time."""
    check_is_file(file)
    if kind := other_kind_of(file):
        raise InputError(f"{file} is {kind}.")
    decoder, number = JSONDecoder(), 0
    try:
        with (
            file.open("rb") as start,
            file.open(encoding=json_encoding(start.read(4))) as stream,
        ):
            while text := stream.readline(_LONGEST_LINE):
                number += 1
                if text.strip():
                    values = with_whole_characters(decoder.decode(text), text)
                    if not isinstance(values, dict):
                        raise InputError(f"{file}, line {number} is not an object in braces.")
                    yield number, values
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not text in UTF-8.") from error
    except OSError as error:
        raise InputError(f"The file {file} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}, line {number} is not valid JSON: {error.msg}; each line must hold one object."
        ) from error
    except (ValueError, RecursionError) as error:
        raise json_error(f"{file}, line {number}", error) from error


class _OnImage(NamedTuple):
    image: ImageFile
    record: dict[str, Any]


def _on_usable_images(
    lines: Lines, records: list[dict[str, Any]], folder: Path, usable: UsableImages, pool: Pool
) -> list[dict[str, Any]]:
    """The records whose image can be used, before its size is relied on."""
    items = [_OnImage(lines.images[record["image_id"]], record) for record in records]
    return [item.record for item in usable.keep(items, folder, pool)]


def _image(lines: Lines, folder: Path, values: dict[str, Any], where: str) -> ImageFile:
    name = values.get("image")
    if not isinstance(name, str):
        raise InputError(f"{where} has the file name {shown(name)}; it must be text.")
    if name not in lines.images:
        width, height = values.get("width"), values.get("height")
        if (width is None or height is None) and is_inside(name):
            width, height = _size_of(folder / name)
        image = image_file(folder, name, width, height, where)
        lines.images[name] = lines.images.setdefault(image.name, image)
    return lines.images[name]


def _size_of(file: Path) -> tuple[int, int]:
    """Width and height of an image, upright; 1 x 1 of a file that the check of the images will
    report.
    """
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in UNTURNED
            return image.size[::-1] if turned else image.size
    except Exception:  # Pillow's readers raise many kinds.
        return 1, 1


# --- Masks and boxes -----------------------------------------------------------------------------


def _masks_of(source: SegmentationSource | CaptioningSource) -> Path:
    return source.path("images" if source.masks is None else "masks")


def _with_masks(
    lines: Lines, records: list[dict[str, Any]], masks: Path, workers: int
) -> list[dict[str, Any]]:
    """The records, with run lengths instead of the file of a mask or lists of polygons."""
    work = []
    for record in records:
        mask = record["segmentation"]
        if isinstance(mask, str):
            if not is_inside(mask):
                raise InputError(
                    f"{lines.where(record)} has the mask {shown(mask)}; it must be a path inside "
                    f"the folder of masks {masks}."
                )
            check_inside(masks, masks / mask)
            try:
                check_is_file(masks / mask)
            except InputError as error:
                where = lines.where(record)
                raise InputError(f"{where} has a mask that cannot be read: {error}") from error
            image = lines.images[record["image_id"]]
            work.append((masks / mask, (image.width, image.height)))
        elif isinstance(mask, list) and mask and not isinstance(mask[0], list):
            record["segmentation"] = [mask]  # one polygon
    chunks = [work[start : start + _CHUNK] for start in range(0, len(work), _CHUNK)]
    read = (rle for found in ordered_map(_read_masks, None, chunks, workers) for rle in found)
    for record in tqdm(records, desc="reading masks", unit="line"):
        if isinstance(record["segmentation"], str):
            record["segmentation"] = next(read)
    return records


def _read_masks(_: None, files: list[tuple[Path, tuple[int, int]]]) -> list[dict[str, Any]]:
    return [_read_mask(file, size) for file, size in files]


def _read_mask(file: Path, size: tuple[int, int]) -> dict[str, Any]:
    try:
        return encode_rle(load_mask(file, size))
    except EmptyMaskError:
        return {"size": [size[1], size[0]], "counts": [size[0] * size[1]]}


def _records(lines: Lines, annotations: list[dict[str, Any]]) -> CheckedCOCO:
    """Annotations, and all images and classes of the lines, as a COCO file."""
    images = {image.name: image for image in lines.images.values()}
    return index_records(
        lines.file,
        {
            "images": [
                {"id": name, "file_name": name, "width": image.width, "height": image.height}
                for name, image in images.items()
            ],
            "categories": [{"id": number, "name": name} for name, number in lines.classes.items()],
            "annotations": annotations,
        },
    )


def _regions(coco: CheckedCOCO, source: CaptioningSource, pool: Pool) -> Iterator[PoolRegion]:
    """A region for each captioned line of a wanted class. The references are the captions of the
    same box.
    """
    places: list[tuple[dict[str, Any], ImageFile, str, Box]] = []
    for record in coco.anns.values():
        category = coco.cats[record["category_id"]]["name"]
        if source.classes is None or category in source.classes:
            image = coco_image(coco, source.path("images"), record["image_id"])
            box = _box(coco, record, image, pool.skipped)
            if box is not None:
                places.append((record, image, category, box))
    texts: dict[tuple[Any, ...], list[str]] = {}
    for record, image, category, box in places:
        key = (image.name, category, box, record["style"])
        texts.setdefault(key, []).append(clean_phrase(record["caption"]))
    for record, image, category, box in places:
        style, text = record["style"], clean_phrase(record["caption"])
        references = tuple(texts[image.name, category, box, style])
        region = caption_region(image, category, record["id"], box, text, references, style)
        if region is None:
            pool.skipped["empty_boxes"] += 1
        else:
            yield region


def _box(
    coco: CheckedCOCO, record: dict[str, Any], image: ImageFile, skipped: Counter[str]
) -> Box | None:
    """The box of a line, or that of its mask. Raises InputError if it has neither."""
    where, values = f"{coco.file}, line {record['id']}", record["bbox"]
    if values is None and record["segmentation"] is not None:
        rle = instance_rle(coco, image, record)
        if rle is None or not rle_tools.area(rle):
            skipped["empty_boxes"] += 1
            return None
        values = list(map(float, rle_tools.toBbox(rle)))
    if values is None:
        raise InputError(f"{where} has a caption but neither a box nor a mask.")
    rect = read_rect(values if isinstance(values, list) else [values], image, where, skipped)
    return None if rect is None else normalise_box(*rect, image.width, image.height)
