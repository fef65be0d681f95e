"""COCO instances -> the segmentation pool: one region for each image and class, its mask the union
of all instances.

Crowds (iscrowd=1, a group of instances under one mask) join the mask of their class, which would
otherwise call pixels of the class background; but a crowd alone makes no region, since its outline
is coarse, and no crop is chosen by a crowd.
"""

import contextlib
import io
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.images import crop_and_resize_mask
from preprocessing.crops import PixelRect, square_crop
from preprocessing.pool import ImageFile, Pool, Region, image_file, keep_present
from preprocessing.recipe import ObjectScale, SegmentationSource
from preprocessing.workers import ordered_map

SMALL_AREA = 32**2
"""COCO's bound of small objects, in pixels of the original image."""


def read_segmentation(
    source: SegmentationSource,
    image_size: int,
    missing_images: Literal["stop", "skip"],
    workers: int,
) -> Pool:
    """The segmentation pool of a COCO instances file. Raises InputError for whatever is wrong in it
    or missing.
    """
    coco = load_coco(source.path("annotations"))
    pool = Pool("segmentation", [])
    masks = _class_masks(coco, source, pool.skipped)
    masks = keep_present(masks, source.path("images"), missing_images, pool.skipped)
    chunks = [masks[start : start + 64] for start in range(0, len(masks), 64)]
    with tqdm(total=len(masks), desc="cutting masks", unit="mask") as progress:
        for regions in ordered_map(_cut_masks, (image_size, source.object_scale), chunks, workers):
            pool.regions += [region for region in regions if region is not None]
            pool.skipped["empty_masks"] += regions.count(None)
            progress.update(len(regions))
    return pool


class CheckedCOCO(COCO):
    """pycocotools' index over a file whose records were checked; `file` is its path."""

    file: Path


def load_coco(file: Path) -> CheckedCOCO:
    """A COCO file (instances or captions), indexed by pycocotools.

    Raises InputError where the file is missing or malformed, where an id stands twice, and where an
    annotation is of an unknown image or category.
    """
    tqdm.write(f"reading {file}", file=sys.stderr)
    content = read_json(file)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise InputError(
            f"{file} is not in COCO's format: lists 'images' and 'annotations' belong there."
        )
    coco = CheckedCOCO()
    coco.file = file
    coco.dataset = content
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{file} has a record without {error}, which COCO's format asks for."
        ) from error
    for kind, index in (("images", coco.imgs), ("annotations", coco.anns)):
        if len(index) != len(content[kind]):
            twice = Counter(record["id"] for record in content[kind]).most_common(1)[0][0]
            raise InputError(f"{file}: two of the {kind} have the id {twice}.")
    for annotation in content["annotations"]:
        where = f"{file}: annotation {annotation['id']}"
        if annotation["image_id"] not in coco.imgs:
            raise InputError(
                f"{where} is of image {annotation['image_id']}, which is not among the file's "
                "images."
            )
        if coco.cats and annotation.get("category_id") not in coco.cats:
            raise InputError(
                f"{where} is of category {annotation.get('category_id')}, which is not among the "
                "file's categories."
            )
    return coco


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises InputError where it is missing or malformed."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"The file {file} does not exist.") from error
    except OSError as error:
        raise InputError(f"The file {file} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}, line {error.lineno}, column {error.colno} is not valid JSON: {error.msg}."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not valid JSON: it is not text in UTF-8.") from error


def coco_image(coco: CheckedCOCO, folder: Path, image_id: int) -> ImageFile:
    """The file of one of the images."""
    record = coco.imgs[image_id]
    return image_file(
        folder,
        record.get("file_name"),
        record.get("width"),
        record.get("height"),
        f"{coco.file}: image {image_id}",
    )


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """The boolean mask (H, W) of COCO's compressed RLE {"size": [H, W], "counts": ...}.

    Raises InputError where the run lengths do not cover H x W pixels exactly: pycocotools hands out
    uninitialised memory there.
    """
    height, width = rle["size"]
    try:
        covered = sum(_run_lengths(rle["counts"]))
    except (IndexError, TypeError, ValueError):
        covered = -1
    if covered != height * width:
        raise InputError(f"run lengths do not cover the {height} x {width} pixels of their mask.")
    return rle_tools.decode(rle).astype(bool)


def encode_mask(mask_HW: np.ndarray) -> bytes:
    """COCO's compressed run lengths of a boolean mask."""
    return rle_tools.encode(np.asfortranarray(mask_HW, dtype=np.uint8))["counts"]


@dataclass(frozen=True, slots=True)
class _ClassMask:
    """The mask of a class in a whole image, compressed RLE, with the boxes of all its instances and
    of the largest.
    """

    image: ImageFile
    category: str
    annotations: tuple[int, ...]
    rle: dict[str, Any]
    objects: PixelRect
    largest: PixelRect


def _class_masks(
    coco: CheckedCOCO, source: SegmentationSource, skipped: Counter[str]
) -> list[_ClassMask]:
    names = {number: record["name"] for number, record in coco.cats.items()}
    wanted = set(names.values()) if source.classes is None else set(source.classes)
    if unknown := sorted(wanted - set(names.values())):
        raise InputError(
            f"segmentation.classes names '{unknown[0]}', which is not among the categories of "
            f"{coco.file}."
        )
    masks = []
    for image_id in tqdm(coco.imgs, desc="reading masks", unit="image"):
        of_class: dict[str, list[dict[str, Any]]] = {}
        for annotation in coco.imgToAnns.get(image_id, ()):
            of_class.setdefault(names[annotation["category_id"]], []).append(annotation)
        if not of_class:
            continue
        image = coco_image(coco, source.path("images"), image_id)
        for category, annotations in of_class.items():
            if category in wanted and (
                mask := _class_mask(
                    coco.file, image, category, annotations, source.small_objects, skipped
                )
            ):
                masks.append(mask)
    return masks


def _class_mask(
    file: Path,
    image: ImageFile,
    category: str,
    annotations: list[dict[str, Any]],
    small_objects: bool,
    skipped: Counter[str],
) -> _ClassMask | None:
    """The union of a class's annotations in one image; None, and counted, where no region comes of
    it.
    """
    rles = [(annotation, _rle(file, image, annotation)) for annotation in annotations]
    drawn = [(annotation, rle) for annotation, rle in rles if rle is not None]
    instances = [rle for annotation, rle in drawn if not annotation.get("iscrowd")]
    if not instances:
        skipped["crowds_alone" if drawn else "empty_masks"] += 1
        return None
    largest = max(instances, key=rle_tools.area)
    if not small_objects and rle_tools.area(largest) < SMALL_AREA:
        skipped["small_objects"] += 1
        return None
    union = rle_tools.merge([rle for _, rle in drawn])
    ids = tuple(annotation["id"] for annotation, _ in drawn)
    return _ClassMask(
        image,
        category,
        ids,
        union,
        tuple(rle_tools.toBbox(union)),
        tuple(rle_tools.toBbox(largest)),
    )


def _rle(file: Path, image: ImageFile, annotation: dict[str, Any]) -> dict[str, Any] | None:
    """An annotation's mask as compressed RLE; None where it has no pixel (COCO knows polygons of
    less than three points).
    """
    where = f"{file}: annotation {annotation['id']}"
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        for polygon in segmentation:
            _check_polygon(polygon, image, where)
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        rle = (
            rle_tools.merge(rle_tools.frPyObjects(polygons, image.height, image.width))
            if polygons
            else None
        )
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        rle = _checked_rle(segmentation, image, where)
    else:
        raise InputError(f"{where} has no segmentation; polygons or RLE belong there.")
    return rle if rle is not None and rle_tools.area(rle) else None


def _check_polygon(polygon: Any, image: ImageFile, where: str) -> None:
    """pycocotools takes any numbers, and with some of them all of the memory."""
    if not isinstance(polygon, list) or not all(
        isinstance(value, int | float) for value in polygon
    ):
        raise InputError(f"{where} has a segmentation that is not lists of numbers.")
    if len(polygon) % 2:
        raise InputError(
            f"{where} has a polygon of {len(polygon)} numbers; pairs of x and y belong there."
        )
    reach = 2 * max(image.width, image.height)
    if not all(math.isfinite(value) and abs(value) <= reach for value in polygon):
        raise InputError(
            f"{where} has a polygon far outside its image of {image.width} x {image.height} pixels."
        )


def _checked_rle(segmentation: dict[str, Any], image: ImageFile, where: str) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation["counts"]
    if size != [image.height, image.width]:
        raise InputError(
            f"{where} has an RLE of size {size}; its image has height {image.height} and width "
            f"{image.width}."
        )
    try:
        runs = counts if isinstance(counts, list) else _run_lengths(counts)
        whole = (
            all(isinstance(run, int) and run >= 0 for run in runs)
            and sum(runs) == image.height * image.width
        )
    except (IndexError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(
            f"{where} has an RLE whose run lengths do not cover its image's {image.height} x "
            f"{image.width} pixels."
        )
    if isinstance(counts, list):
        return rle_tools.frPyObjects(segmentation, image.height, image.width)
    return {"size": size, "counts": counts}


def _run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed form: numbers of 5-bit groups, low group first, from the
    third on as the difference to the last but one (pycocotools' maskApi.c, rleFrString).
    """
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    runs: list[int] = []
    position = 0
    while position < len(text):
        value = shift = 0
        group = 0x20
        while group & 0x20:
            group = text[position] - 48
            if not 0 <= group < 64:
                raise ValueError("not a character of run lengths")
            value |= (group & 0x1F) << shift
            shift += 5
            position += 1
        if group & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    if any(run < 0 for run in runs):
        raise ValueError("a run length is negative")
    return runs


def _cut_masks(settings: tuple[int, ObjectScale], masks: list[_ClassMask]) -> list[Region | None]:
    """Each mask cut to its crop and drawn at image_size; None where nothing is left to see."""
    image_size, scale = settings
    regions: list[Region | None] = []
    for mask in masks:
        image = mask.image
        crop = square_crop(scale, mask.objects, mask.largest, image.width, image.height, image_size)
        mask_HW = crop_and_resize_mask(decode_mask(mask.rle), crop, image_size)
        if mask_HW.any():
            regions.append(
                Region(
                    image,
                    mask.category,
                    mask.annotations,
                    crop,
                    float(mask_HW.mean()),
                    mask=encode_mask(mask_HW),
                )
            )
        else:
            regions.append(None)
    return regions
