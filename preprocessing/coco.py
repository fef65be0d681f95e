"""COCO instances -> the segmentation pool: one region for each image and class, its mask the union
of all instances.

Crowds (iscrowd=1, a group of instances under one mask) join the mask of their class; otherwise
pixels of the class would count as background. A crowd without other instances makes no region,
since its outline is coarse, and is never the instance that a `large` crop surrounds.
"""

import contextlib
import io
import itertools
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from tqdm import tqdm

from icl_moe.errors import InputError, shown
from icl_moe.images import PixelBox, crop_and_resize_mask
from icl_moe.inputs import check_is_file, read_json
from icl_moe.rle import decode_rle, run_lengths
from icl_moe.tasks.segmentation import MaskTarget
from preprocessing.absent import NO_CLASS, with_absent
from preprocessing.crops import PixelRect, square_crop
from preprocessing.image_check import UsableImages
from preprocessing.json_stream import NotPlainError, object_members
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import ObjectScale, SegmentationSource
from preprocessing.records import image_file, is_id, kinds_of_id, local_name, unaugmented
from preprocessing.region_table import RegionTable, TableWriter
from preprocessing.workers import ordered_map

SMALL_AREA = 32**2
"""COCO's upper bound on the area of a small object, in pixels of the original image."""

_LONGEST_OUTLINE = 4e6
"""The longest outline of a polygon, in pixels: pycocotools uses about a hundred bytes for each."""


def read_segmentation(
    source: SegmentationSource, image_size: int, usable: UsableImages, workers: int
) -> Pool:
    """The segmentation pool of a COCO instances file. Raises InputError if anything in it is wrong
    or missing.
    """
    coco = load_instances(source.path("annotations"))
    return read_instances(coco, source, image_size, usable, workers)


def read_instances(
    coco: "CheckedCOCO",
    source: SegmentationSource,
    image_size: int,
    usable: UsableImages,
    workers: int,
    unsure: Mapping[Any, Set[str]] | None = None,
) -> Pool:
    """The same as `read_segmentation`, for records that are already loaded.

    unsure: image id -> classes of which not all instances in the image are annotated. The image
    gets no mask of such a class, since the instances without annotation would count as background.
    """
    cutter = _Cutter(coco, source, image_size, unsure or {})
    cutter.check()
    pool, parts = Pool("segmentation", []), list[_Cut]()
    images = list(coco.imgs)
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    ids: dict[str, Any] = {}
    with tqdm(total=len(images), desc="reading masks", unit="image") as progress:
        for part, chunk in zip(
            ordered_map(_cut_images, cutter, chunks, workers), chunks, strict=True
        ):
            for image_id, name in part.names:
                if ids.setdefault(name, image_id) != image_id:
                    raise _same_name(coco.file, ids[name], image_id, name)
            if part.error is not None:
                raise part.error
            pool.skipped.update(part.skipped)
            parts.append(part)
            progress.update(len(chunk))
    table = RegionTable.concatenate([part.table for part in parts])
    items = [_Shown(image) for image in table.images()]
    usable_images = {item.image.name for item in usable.keep(items, source.path("images"), pool)}
    is_usable = np.array([item.image.name in usable_images for item in items], dtype=bool)
    for reason in ("empty_masks", "masks_of_small_scale"):
        counts = [part.left_out[reason] for part in parts]
        pool.skipped[reason] += int(np.concatenate(counts or [np.zeros(0)])[is_usable].sum())
    table = table.select(is_usable[table.image_numbers()])
    if source.absent:
        shown = {name: set(cutter.annotated(image_id)) for name, image_id in ids.items()}
        table, pool.absent = with_absent(table, shown, source.absent, image_size)
    pool.regions = table
    pool.count_classes_without_a_region(source.classes)
    return pool


_CHUNK = 64
"""Images whose masks a process cuts at once."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """An image that shows masks."""

    image: ImageFile


class CheckedCOCO(COCO):
    """pycocotools' index over a file whose records were checked; `file` is its path."""

    file: Path


def load_instances(file: Path) -> CheckedCOCO:
    """A COCO instances file, indexed by pycocotools.

    Raises InputError if the file is missing or malformed, if an id or an image's file name occurs
    twice, or if an annotation refers to an unknown image or category.
    """
    content = _load(file, ("images", "annotations", "categories"))
    for place, record in enumerate(content["categories"]):
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            raise InputError(
                f"{file}: entry {place} of 'categories' has the name {shown(name)}; it must be "
                "text."
            )
    _check_file_names(file, content["images"])
    _check_references(file, content, "category_id", "categories")
    for annotation in content["annotations"]:
        if annotation.get("iscrowd", 0) is None:
            annotation["iscrowd"] = 0  # as pylabel writes it
        if annotation.get("iscrowd", 0) not in (0, 1):
            raise InputError(
                f"{file}: annotation {annotation['id']} has the iscrowd "
                f"{shown(annotation['iscrowd'])}; it must be 0 or 1."
            )
    return index_records(file, content)


def load_captions(file: Path) -> CheckedCOCO:
    """A COCO captions file, indexed by pycocotools. Raises InputError as `load_instances` does, and
    if an annotation has no caption.
    """
    content = _load(file, ("images", "annotations"))
    for annotation in content["annotations"]:
        caption = annotation.get("caption", 0)
        if caption is not None and not isinstance(caption, str):
            raise InputError(
                f"{file}: annotation {annotation['id']} has no text as its caption; this must be a "
                "captions file."
            )
    return index_records(file, content)


def _load(file: Path, lists: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The named lists of a COCO file, after checking that records have ids and refer to images of
    the file.
    """
    tqdm.write(f"reading {file}", file=sys.stderr)
    content = _read(file, lists)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(kind), list) for kind in ("images", "annotations")
    ):
        raise InputError(
            f"{file} is not in COCO's format: it must hold the lists 'images' and 'annotations'."
        )
    if "categories" in lists and not content.get("categories"):
        raise InputError(
            f"{file} has no categories; it must be a COCO instances file, which names them."
        )
    if not content["annotations"]:
        raise InputError(f"{file} has no annotations.")
    for kind in lists:
        _check_records(file, kind, content[kind])
    _check_references(file, content, "image_id", "images")
    return {kind: content[kind] for kind in lists}


def _read(file: Path, lists: tuple[str, ...]) -> Any:
    """The content of a file, of which lists other than the named ones may be missing."""
    check_is_file(file)
    content: dict[str, Any] = {}
    try:
        for key, value in object_members(file):
            if key not in lists or not isinstance(value, list):
                content[key] = value if key in lists else None
                continue
            if key == "annotations":
                _pack_polygons(value)
            content.setdefault(key, []).extend(value)
        return content
    except NotPlainError:
        return read_json(file)
    except OSError as error:
        raise InputError(f"The file {file} cannot be read: {error.strerror}.") from error


def _pack_polygons(annotations: list[Any]) -> None:
    """Hold polygons as arrays of floats, which take a fifth of the memory of lists. What is no list
    of numbers stays as it is, for `_check_polygon`.
    """
    for annotation in annotations:
        outline = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if isinstance(outline, list):
            annotation["segmentation"] = [_packed(polygon) for polygon in outline]


def _packed(polygon: Any) -> Any:
    if isinstance(polygon, list) and {*map(type, polygon)} <= {int, float}:
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            return array("d", polygon)
    return polygon


def index_records(file: Path, content: dict[str, list[dict[str, Any]]]) -> CheckedCOCO:
    """pycocotools' index over records in COCO's form, which a reader has made from `file` and
    checked.
    """
    coco = CheckedCOCO()
    coco.file, coco.dataset = file, content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _check_records(file: Path, kind: str, records: Any) -> None:
    """Each image, annotation or category must be a record with a unique id."""
    if not isinstance(records, list):
        raise InputError(f"{file} is not in COCO's format: '{kind}' must be a list.")
    seen = set()
    for place, record in enumerate(records):
        number = record.get("id") if isinstance(record, dict) else None
        if not is_id(number):
            found = f"has the id {shown(number)}" if isinstance(record, dict) else "is not a record"
            raise InputError(
                f"{file}: entry {place} of '{kind}' {found}; it must be a record whose id is a "
                "whole number or text."
            )
        if number in seen:
            raise InputError(f"{file}: two of the {kind} have the id {shown(number)}.")
        seen.add(number)


def _check_references(file: Path, content: dict[str, Any], key: str, kind: str) -> None:
    """Each annotation must refer to an image, or category, of the file."""
    known = {record["id"] for record in content[kind]}
    for annotation in content["annotations"]:
        number = annotation.get(key)
        if not is_id(number) or number not in known:
            raise InputError(
                f"{file}: annotation {annotation['id']} is of {key.removesuffix('_id')} "
                f"{shown(number)}, which is not among the file's {kind}"
                f"{kinds_of_id(known, number)}."
            )


def _check_file_names(file: Path, images: list[dict[str, Any]]) -> None:
    """An image that occurs twice would have only some of its instances each time."""
    ids: dict[PurePosixPath, Any] = {}
    for record in images:
        name, number = record.get("file_name"), record["id"]
        if isinstance(name, str) and ids.setdefault(PurePosixPath(name), number) != number:
            raise _same_name(file, ids[PurePosixPath(name)], number, name)


def _same_name(file: Path, one: Any, other: Any, name: str) -> InputError:
    return InputError(
        f"{file}: the images {shown(one)} and {shown(other)} have the same file name "
        f"{shown(name)}; each file may have only one record."
    )


def coco_image(coco: CheckedCOCO, folder: Path, image_id: Any) -> ImageFile:
    """The file of an image. Raises InputError if its record names no file of the folder."""
    record = coco.imgs[image_id]
    return image_file(
        folder,
        local_name(folder, record.get("file_name")),
        record.get("width"),
        record.get("height"),
        f"{coco.file}: image {image_id}",
    )


def class_masks(coco: CheckedCOCO, image_id: Any) -> dict[int, np.ndarray]:
    """Category id -> the mask (H, W) of all its pixels in an image, crowds included. Raises
    InputError if an annotation is wrong.
    """
    image = coco_image(coco, Path(), image_id)
    masks = _OfImage(coco.file, image, SegmentationSource(crowds="instances"), Counter())
    of_class: dict[int, list[dict[str, Any]]] = {}
    for annotation in coco.imgToAnns.get(image_id, ()):
        of_class.setdefault(annotation["category_id"], []).append(annotation)
    found = {
        number: masks.of_class(coco.cats[number]["name"], annotations)
        for number, annotations in sorted(of_class.items())
    }
    return {number: decode_rle(mask.rle) for number, mask in found.items() if mask is not None}


def instance_rle(
    coco: CheckedCOCO, image: ImageFile, annotation: dict[str, Any]
) -> dict[str, Any] | None:
    """The mask of one annotation as compressed RLE; None if it has no outline. Raises InputError if
    the annotation is wrong.
    """
    return _OfImage(coco.file, image, SegmentationSource(), Counter()).rle(annotation)


@dataclass(frozen=True, slots=True)
class _ClassMask:
    """The mask of a class in a whole image as compressed RLE, with the boxes of all its instances
    and of the largest one.

    seen: class -> mask, for every class annotated in the image, whether the recipe uses it or not.
    """

    image: ImageFile
    category: str
    annotations: tuple[Any, ...]
    rle: dict[str, Any]
    objects: PixelRect
    largest: PixelRect
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Cutter:
    """Cuts the masks of the wanted classes out of images."""

    def __init__(
        self,
        coco: CheckedCOCO,
        source: SegmentationSource,
        image_size: int,
        unsure: Mapping[Any, Set[str]],
    ) -> None:
        self.coco, self.source, self.image_size, self.unsure = coco, source, image_size, unsure
        self.names = {number: record["name"] for number, record in coco.cats.items()}
        self.wanted = set(self.names.values()) if source.classes is None else set(source.classes)

    def check(self) -> None:
        """Raise InputError if the file lacks a wanted class, or has only crowds of them."""
        check_classes("segmentation.classes", self.wanted, self.coco)
        crowds = [
            bool(annotation.get("iscrowd"))
            for annotation in self.coco.anns.values()
            if self.names[annotation["category_id"]] in self.wanted
        ]
        if self.source.crowds == "join" and crowds and all(crowds):
            raise InputError(
                f"{self.coco.file}: all instances are crowds (iscrowd=1), which make no region; "
                "set segmentation.crowds=instances to treat each as an instance."
            )

    def annotated(self, image_id: Any) -> dict[str, list[dict[str, Any]]]:
        """Class -> its annotations in an image, whether it is wanted or not."""
        found: dict[str, list[dict[str, Any]]] = {}
        for annotation in self.coco.imgToAnns.get(image_id, ()):
            found.setdefault(self.names[annotation["category_id"]], []).append(annotation)
        return found

    def of_class(self, image_id: Any, skipped: Counter[str]) -> dict[str, list[dict[str, Any]]]:
        """Class -> its annotations in an image; empty if none is wanted."""
        found = self.annotated(image_id)
        for name in self.unsure.get(image_id, ()):
            skipped["masks_not_exhaustive"] += found.pop(name, None) is not None
        return {} if self.wanted.isdisjoint(found) else found

    def without_region(self, image_id: Any, image: ImageFile) -> PoolRegion:
        """An image of which no region is made, as one of no class; see `with_absent`."""
        beside = _OfImage(self.coco.file, image, SegmentationSource(crowds="instances"), Counter())
        masks = itertools.starmap(beside.of_class, self.annotated(image_id).items())
        seen = {mask.category: mask.rle for mask in masks if mask is not None}
        whole = (0, 0, image.width, image.height)
        crop = square_crop("any", whole, whole, image.width, image.height, self.image_size)
        cut = _cutting(seen, self.image_size)(crop)
        target = MaskTarget(b"", tuple((name, _counts(cut_HW)) for name, cut_HW in cut.items()))
        return PoolRegion(image, NO_CLASS, (), crop, 0.0, target, origin=unaugmented(image.name))


@dataclass
class _Cut:
    """The regions of some images. names: the names of the images that were looked at, by id.
    left_out: reason -> how many masks of each image of the table have no region for this reason.
    error: the error that ended the reading early.
    """

    table: RegionTable
    names: list[tuple[Any, str]]
    skipped: Counter[str]
    left_out: dict[str, np.ndarray]
    error: InputError | None = None


def _cut_images(cutter: _Cutter, image_ids: list[Any]) -> _Cut:
    """The regions of images; if an image's annotations are wrong, of the images before it."""
    writer, source, error = TableWriter(), cutter.source, None
    cut = _Cut(RegionTable.of([]), [], Counter(), {})
    empty, small = array("q"), array("q")
    try:
        for image_id in image_ids:
            of_class = cutter.of_class(image_id, cut.skipped)
            if not (of_class or source.absent):
                continue
            image = coco_image(cutter.coco, source.path("images"), image_id)
            cut.names.append((image_id, image.name))
            masks = _masks_of_image(
                cutter.coco.file, image, source, cut.skipped, of_class, cutter.wanted
            )
            if not (masks or source.absent):
                continue
            writer.add_image(image)
            regions = _cut_masks(cutter.image_size, source.object_scale, masks) if masks else []
            seen = [region for region in regions if region is not None]
            large = [region for region in seen if region.scale >= source.least_scale]
            for region in large:
                writer.add(region)
            if source.absent and not large and not image.is_too_large:
                writer.add(cutter.without_region(image_id, image))
            empty.append(regions.count(None))
            small.append(len(seen) - len(large))
    except InputError as found:
        error = found
    left_out = {"empty_masks": np.array(empty), "masks_of_small_scale": np.array(small)}
    return replace(cut, table=writer.table(), left_out=left_out, error=error)


def _masks_of_image(
    file: Path,
    image: ImageFile,
    source: SegmentationSource,
    skipped: Counter[str],
    of_class: dict[str, list[dict[str, Any]]],
    wanted: set[str],
) -> list[_ClassMask]:
    """The masks of the wanted classes in one image, each with the masks of all its classes."""
    masks = _OfImage(file, image, source, skipped)
    found = {
        name: mask
        for name, annotations in of_class.items()
        if name in wanted and (mask := masks.of_class(name, annotations)) is not None
    }
    # A class that makes no region, such as a crowd alone, is still visible in the image.
    beside = _OfImage(file, image, SegmentationSource(crowds="instances"), Counter())
    seen = {
        name: mask.rle
        for name, annotations in of_class.items()
        if (mask := found.get(name) or beside.of_class(name, annotations)) is not None
    }
    return [replace(mask, seen=seen) for mask in found.values()]


def check_classes(key: str, wanted: set[str], coco: CheckedCOCO) -> None:
    """Raise InputError if one of a recipe's classes is not a category of the file."""
    if unknown := sorted(wanted - {record["name"] for record in coco.cats.values()}):
        raise InputError(
            f"{key} names '{unknown[0]}', which is not among the categories of {coco.file}."
        )


@dataclass(frozen=True)
class _OfImage:
    """Draws the masks of one image."""

    file: Path
    image: ImageFile
    source: SegmentationSource
    skipped: Counter[str]

    def of_class(self, category: str, annotations: list[dict[str, Any]]) -> _ClassMask | None:
        """The union of a class's annotations. If it makes no region, counts the reason and returns
        None.

        An instance without an outline makes no region either: its pixels would count as background.
        """
        # There is no memory for the mask of such an image; the check of the images names it.
        if self.image.is_too_large:
            return _ClassMask(self.image, category, (), {}, (0, 0, 0, 0), (0, 0, 0, 0))
        rles = [(annotation, self.rle(annotation)) for annotation in annotations]
        drawn = [(a, rle) for a, rle in rles if rle is not None and rle_tools.area(rle)]
        if not drawn:
            self.skipped["empty_masks"] += 1
            return None
        if any(rle is None for _, rle in rles):
            self.skipped["masks_lacking_an_instance"] += 1
            return None
        self.skipped["instances_without_a_pixel"] += len(rles) - len(drawn)
        joins = self.source.crowds == "join"
        instances = [rle for annotation, rle in drawn if not (joins and annotation.get("iscrowd"))]
        if not instances:
            self.skipped["crowds_alone"] += 1
            return None
        largest = max(instances, key=rle_tools.area)
        if not self.source.small_objects and rle_tools.area(largest) < SMALL_AREA:
            self.skipped["small_objects"] += 1
            return None
        if self.source.marks == "largest_instance":
            drawn = [next((a, rle) for a, rle in drawn if rle is largest)]
        union = rle_tools.merge([rle for _, rle in drawn])
        return _ClassMask(
            self.image,
            category,
            tuple(annotation["id"] for annotation, _ in drawn),
            union,
            tuple(rle_tools.toBbox(union)),
            tuple(rle_tools.toBbox(largest)),
        )

    def rle(self, annotation: dict[str, Any]) -> dict[str, Any] | None:
        """An annotation's mask as compressed RLE; None if it has no outline: no polygon, or none of
        three points.
        """
        where = f"{self.file}: annotation {annotation['id']}"
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and "counts" in segmentation:
            return _checked_rle(segmentation, self.image, where)
        if not isinstance(segmentation, list):
            raise InputError(f"{where} has no segmentation; it must be polygons or RLE.")
        for polygon in segmentation:
            _check_polygon(polygon, self.image, where)
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return None
        self.skipped["polygons_without_an_area"] += len(segmentation) - len(polygons)
        return rle_tools.merge(rle_tools.frPyObjects(polygons, self.image.height, self.image.width))


def _check_polygon(polygon: Any, image: ImageFile, where: str) -> None:
    """Check polygons: pycocotools accepts any numbers, and for some of them uses all memory."""
    if not isinstance(polygon, array) and (
        not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}
    ):
        raise InputError(f"{where} has a segmentation that is not lists of numbers.")
    if len(polygon) % 2:
        raise InputError(
            f"{where} has a polygon of {len(polygon)} numbers; it must be pairs of x and y."
        )
    reach = 2 * max(image.width, image.height)
    if not _is_within(polygon, reach):
        raise InputError(
            f"{where} has a polygon far outside its image of {image.width} x {image.height} pixels."
        )
    if len(polygon) * reach > _LONGEST_OUTLINE:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
        if length > _LONGEST_OUTLINE:
            raise InputError(
                f"{where} has a polygon whose outline is {length:.0f} pixels long, too long for an "
                "object."
            )


def _is_within(values: Sequence[float], reach: int) -> bool:
    """Whether no value is farther from 0 than `reach`; not so for NaN."""
    try:
        return bool((np.abs(np.array(values, dtype=np.float64)) <= reach).all())
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _checked_rle(segmentation: dict[str, Any], image: ImageFile, where: str) -> dict[str, Any]:
    counts, size = segmentation["counts"], [image.height, image.width]
    if segmentation.get("size") != size:
        raise InputError(
            f"{where} has an RLE of size {shown(segmentation.get('size'))}; its image has height "
            f"{image.height} and width {image.width}."
        )
    try:
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        whole = (
            all(type(run) is int and run >= 0 for run in runs)
            and sum(runs) == image.height * image.width
        )
    except (IndexError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(
            f"{where} has an RLE whose run lengths do not cover its image's {image.height} x "
            f"{image.width} pixels."
        )
    rle = {"size": size, "counts": counts}
    return rle_tools.frPyObjects(rle, *size) if isinstance(counts, list) else rle


def _cut_masks(
    image_size: int, scale: ObjectScale, masks: list[_ClassMask]
) -> list[PoolRegion | None]:
    """The masks of one image, each cropped and scaled to image_size; None if no pixel of it
    remains. None at all of an image that is too large, which cannot be used.
    """
    image = masks[0].image
    if image.is_too_large:
        return []
    cut_out = _cutting(masks[0].seen, image_size)
    regions: list[PoolRegion | None] = []
    for mask in masks:
        crop = square_crop(scale, mask.objects, mask.largest, image.width, image.height, image_size)
        cut = cut_out(crop)
        if mask.category not in cut:
            regions.append(None)
            continue
        counts = {name: _counts(cut_HW) for name, cut_HW in cut.items()}
        regions.append(
            PoolRegion(
                image,
                mask.category,
                mask.annotations,
                crop,
                float(cut[mask.category].mean()),
                MaskTarget(counts[mask.category], tuple(counts.items())),
                origin=unaugmented(image.name),
            )
        )
    return regions


def _cutting(
    seen: dict[str, dict[str, Any]], image_size: int
) -> Callable[[PixelBox], dict[str, np.ndarray]]:
    """Cuts the masks of an image's classes: those of which a pixel remains in a crop, at
    image_size.
    """
    # pycocotools has made these run lengths, so they need no check.
    whole = {name: rle_tools.decode(rle).view(bool) for name, rle in seen.items()}
    around = {name: _bounds(rle) for name, rle in seen.items()}

    def cut(crop: PixelBox) -> dict[str, np.ndarray]:
        return {
            name: cut_HW
            for name, mask_HW in whole.items()
            if _overlap(around[name], crop)
            and (cut_HW := crop_and_resize_mask(mask_HW, crop, image_size)).any()
        }

    return cut


def _bounds(rle: dict[str, Any]) -> PixelBox:
    x, y, width, height = map(int, rle_tools.toBbox(rle))
    return x, y, x + width, y + height


def _overlap(one: PixelBox, other: PixelBox) -> bool:
    return all(max(one[n], other[n]) < min(one[n + 2], other[n + 2]) for n in (0, 1))


def _counts(mask_HW: np.ndarray) -> bytes:
    """A mask's compressed run lengths: those of `encode_rle`, in C."""
    counts: bytes = rle_tools.encode(np.asfortranarray(mask_HW.view(np.uint8)))["counts"]
    return counts
