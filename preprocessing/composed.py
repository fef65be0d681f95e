"""Compositions: the objects of a COCO data set, cut out and pasted into its own images, as a source
of segmentation pairs.

A composition is a square part of a photograph, at the model's image size, with up to `pasted`
cut-outs of other photographs. Objects in front cover those behind, in the picture and in the masks:
a mask is the set of visible pixels of an object. Edges are softened only in the picture. Each
composition is a pure function of the seed and its number. Compositions are written in COCO's
format, with the provenance of every object, and read like any such data set.

The idea is that of Dwibedi et al. 2017 ("Cut, Paste and Learn") and Ghiasi et al. 2021 ("Simple
Copy-Paste").
"""

import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as rle_tools
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.images import box_of_mask, crop_and_resize, crop_and_resize_mask
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.seeds import order_of_turn
from preprocessing import coco
from preprocessing.folder import load_folder
from preprocessing.image_check import Item, Unchecked, UsableImages, open_image
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import ComposedImages, SegmentationSource
from preprocessing.records import unaugmented
from preprocessing.synthetic import window, write_json
from preprocessing.workers import ordered_map

LEAST_CUT = 0.01
"""The least area of a cut-out, as a share of its photograph; smaller ones show too little
detail.
"""

LEAST_VISIBLE = 0.5
"""The share of an object that must stay visible if another one covers it, or at the frame."""

_SIDES = (0.2, 0.65)
"""The range of a pasted object's longer side, in sides of the composition."""

_MOST_ENLARGED = 1.5
_CHUNK = 32
_TRIES = 12


# --- The pool ------------------------------------------------------------------------------------


def read_segmentation(
    album: "Album", source: SegmentationSource, image_size: int, folder: Path, workers: int
) -> Pool:
    """The pool of an album's compositions, which are in `folder`, and of its photographs if the
    source includes them.
    """
    files = replace(
        source, images=str(folder / "images"), annotations=str(folder / "instances.json")
    )
    made = coco.load_instances(files.path("annotations"))
    compositions = coco.read_instances(made, files, image_size, Unchecked(), workers)
    pool = album.pool
    pool.same_instance = source.composed.same_instance
    pool.skipped += compositions.skipped
    pool.absent = compositions.absent
    of_image = {record["file_name"]: made.imgToAnns[number] for number, record in made.imgs.items()}
    regions = [
        _absent_from(of_image[region.image.name], region)
        if region.is_absent
        else _with_provenance(made, region)
        for region in compositions.regions
    ]
    if source.composed.photographs:
        of_images = coco.read_instances(album.coco, source, image_size, album, workers)
        pool.skipped += of_images.skipped
        pool.absent += of_images.absent
        regions += [_of_photograph(album, region) for region in of_images.regions]
    pool.regions = regions
    return pool


def _with_provenance(made: coco.CheckedCOCO, region: PoolRegion) -> PoolRegion:
    """A region of a composition with the provenance of its objects."""
    annotations = [made.anns[number] for number in region.annotations]
    largest = max(annotations, key=lambda annotation: annotation["area"])["provenance"]
    alone = len(annotations) == 1 and largest["pasted"]
    return replace(
        region,
        origin=unaugmented(largest["image"]) or largest["image"],
        instance=(largest["image_id"], largest["annotation_id"]) if alone else None,
        provenance=tuple(annotation["provenance"] for annotation in annotations),
    )


def _absent_from(annotations: list[dict[str, Any]], region: PoolRegion) -> PoolRegion:
    """A region whose class a composition lacks, with the provenance of all that it shows."""
    return replace(region, provenance=tuple(annotation["provenance"] for annotation in annotations))


def _of_photograph(album: "Album", region: PoolRegion) -> PoolRegion:
    if len(region.annotations) != 1:
        return region
    (number,) = region.annotations
    return replace(region, instance=(album.coco.anns[number]["image_id"], number))


# --- What can be cut out -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Photograph:
    image_id: Any
    image: ImageFile


@dataclass(frozen=True)
class _Cut:
    """An instance that can be cut out of its photograph."""

    photograph: _Photograph
    annotation: dict[str, Any]


@dataclass(frozen=True)
class Album:
    """A data set from which compositions are made. cuts: category id -> cut-outs. pool: counts what
    was left out.
    """

    coco: coco.CheckedCOCO
    photographs: tuple[_Photograph, ...]
    cuts: dict[Any, list[_Cut]]
    pool: Pool

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        """The items on photographs of the album, as in `UsableImages`. The other items have been
        counted already.
        """
        images = {photograph.image for photograph in self.photographs}
        return [item for item in items if item.image in images]


def open_album(source: SegmentationSource, usable: UsableImages, workers: int = 0) -> Album:
    """The data set of a source, with checked images. Raises InputError if anything in it is wrong,
    or if it has no object to cut out.
    """
    pool = Pool("segmentation", [])
    if source.masks is None:
        file = coco.load_instances(source.path("annotations"))
    else:
        file, pool.skipped = load_folder(source, workers)
    folder = source.path("images")
    names = {number: record["name"] for number, record in file.cats.items()}
    wanted = set(names.values()) if source.classes is None else set(source.classes)
    coco.check_classes("segmentation.classes", wanted, file)
    every = [_Photograph(number, coco.coco_image(file, folder, number)) for number in file.imgs]
    photographs = usable.keep(every, folder, pool)
    cuts: dict[Any, list[_Cut]] = {}
    for photograph in tqdm(photographs, desc="looking for objects", unit="image"):
        for annotation in file.imgToAnns.get(photograph.image_id, ()):
            category = annotation["category_id"]
            crowd = annotation.get("iscrowd") and source.crowds == "join"
            if names[category] in wanted and not crowd and _is_large(file, photograph, annotation):
                cuts.setdefault(category, []).append(_Cut(photograph, annotation))
    if not cuts:
        raise InputError(
            f"{file.file} has no object of the wanted classes that covers {LEAST_CUT:.0%} of its "
            "image and can be cut out; set segmentation.source=coco (or folder)."
        )
    return Album(file, tuple(photographs), dict(sorted(cuts.items(), key=str)), pool)


def _is_large(file: coco.CheckedCOCO, photograph: _Photograph, annotation: dict[str, Any]) -> bool:
    rle = coco.instance_rle(file, photograph.image, annotation)
    image = photograph.image
    return rle is not None and rle_tools.area(rle) >= LEAST_CUT * image.width * image.height


# --- Compositions --------------------------------------------------------------------------------


@dataclass
class _Placed:
    """An object in a composition: the mask (size, size) of its visible part, None if its annotation
    has no outline, and its number of pixels before anything covered it.
    """

    category_id: Any
    crowd: int
    mask_HW: np.ndarray | None
    whole: int
    provenance: dict[str, Any]

    def may_be_covered_by(self, mask_HW: np.ndarray) -> bool:
        """Whether enough of it would stay visible. Crowds and small objects behind may vanish."""
        if self.mask_HW is None or self.crowd:
            return True
        left = int((self.mask_HW & ~mask_HW).sum())
        small = not self.provenance["pasted"] and self.whole < LEAST_CUT * mask_HW.size
        return small or left >= LEAST_VISIBLE * self.whole


def compose(
    album: Album, composed: ComposedImages, size: int, index: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Composition number `index`, `size` pixels square, with COCO's annotations, without ids, of
    everything visible in it.
    """
    rng = np.random.default_rng([composed.seed, zlib.crc32(b"composed"), index])
    turn, place = divmod(index, len(album.photographs))
    order = order_of_turn(len(album.photographs), composed.seed, turn)
    canvas_HW3, objects = _background(rng, album, album.photographs[order[place]], size)
    least = min(1, composed.pasted)
    for _ in range(int(rng.integers(least, composed.pasted + 1))):
        cut = _choose(rng, album, composed.balance, {o.category_id for o in objects})
        _paste(rng, album, cut, canvas_HW3, objects)
    image = Image.fromarray(canvas_HW3.clip(0, 255).round().astype(np.uint8))
    return image, [_annotation(placed) for placed in objects if _is_seen(placed)]


def _choose(rng: np.random.Generator, album: Album, balance: float, present: set[Any]) -> _Cut:
    """A cut-out of a class that the composition does not show yet, if there is one."""
    classes = [number for number in album.cuts if number not in present] or list(album.cuts)
    weights = np.array([len(album.cuts[number]) for number in classes]) ** (1.0 - balance)
    of_class = album.cuts[classes[int(rng.choice(len(classes), p=weights / weights.sum()))]]
    return of_class[int(rng.integers(len(of_class)))]


def _background(
    rng: np.random.Generator, album: Album, photograph: _Photograph, size: int
) -> tuple[np.ndarray, list[_Placed]]:
    """A square part of a photograph, perhaps mirrored, with random lighting: float pixels (size,
    size, 3), and its annotations.
    """
    image = photograph.image
    side = max(1, round(min(image.width, image.height) * rng.uniform(0.6, 1.0)))
    left = int(rng.integers(image.width - side + 1))
    top = int(rng.integers(image.height - side + 1))
    crop, mirrored, light_3 = (left, top, left + side, top + side), rng.random() < 0.5, _light(rng)
    across = slice(None, None, -1 if mirrored else 1)
    square = crop_and_resize(_open(image), crop, size)
    canvas_HW3 = np.asarray(square, dtype=np.float32)[:, across] * light_3
    objects = []
    for annotation in album.coco.imgToAnns.get(photograph.image_id, ()):
        rle = coco.instance_rle(album.coco, image, annotation)
        mask_HW = None
        if rle is not None:
            mask_HW = crop_and_resize_mask(decode_rle(rle), crop, size)[:, across]
        provenance = {
            **_source(photograph, annotation, pasted=False),
            "crop": crop,
            "mirrored": mirrored,
            "light": _rounded(light_3),
        }
        whole = 0 if mask_HW is None else int(mask_HW.sum())
        category, crowd = annotation["category_id"], int(annotation.get("iscrowd") or 0)
        objects.append(_Placed(category, crowd, mask_HW, whole, provenance))
    return canvas_HW3, objects


def _paste(
    rng: np.random.Generator,
    album: Album,
    cut: _Cut,
    canvas_HW3: np.ndarray,
    objects: list[_Placed],
) -> None:
    """Paste a cut-out at a place where every covered object stays sufficiently visible; do nothing
    if no such place is found.
    """
    size = canvas_HW3.shape[0]
    sprite = _cut_out(rng, album, cut, size)
    whole = int(sprite.mask_hw.sum())
    for _ in range(_TRIES if whole else 0):
        x, y = rng.uniform(0.05, 0.95, 2) * size
        corner = (round(x - sprite.mask_hw.shape[1] / 2), round(y - sprite.mask_hw.shape[0] / 2))
        scene, patch = window(corner, sprite.mask_hw.shape, size)
        mask_HW = np.zeros((size, size), dtype=bool)
        mask_HW[scene] = sprite.mask_hw[patch]
        seen = int(mask_HW.sum())
        if seen < max(1, LEAST_VISIBLE * whole):
            continue
        if not all(placed.may_be_covered_by(mask_HW) for placed in objects):
            continue
        for placed in objects:
            if placed.mask_HW is not None:
                placed.mask_HW = placed.mask_HW & ~mask_HW
        alpha_hw1 = sprite.alpha_hw[patch][..., None]
        canvas_HW3[scene] += alpha_hw1 * (sprite.pixels_hw3[patch] - canvas_HW3[scene])
        height, width = sprite.mask_hw.shape
        box = (corner[0], corner[1], corner[0] + width, corner[1] + height)
        provenance = {**sprite.provenance, "box": box}
        objects.append(_Placed(cut.annotation["category_id"], 0, mask_HW, seen, provenance))
        return


@dataclass(frozen=True)
class _Sprite:
    """A cut-out ready for pasting: its pixels, their opacity, and its mask."""

    pixels_hw3: np.ndarray
    alpha_hw: np.ndarray
    mask_hw: np.ndarray
    provenance: dict[str, Any]


def _cut_out(rng: np.random.Generator, album: Album, cut: _Cut, size: int) -> _Sprite:
    """A cut-out, scaled, rotated, perhaps mirrored, and with random lighting."""
    rle = coco.instance_rle(album.coco, cut.photograph.image, cut.annotation)
    assert rle is not None, "objects without an outline are not cut out"
    mask_HW = decode_rle(rle)
    left, top, right, bottom = box_of_mask(mask_HW)
    longest = min(rng.uniform(*_SIDES) * size, _MOST_ENLARGED * max(right - left, bottom - top))
    scale = longest / max(right - left, bottom - top)
    shape = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    mirrored, turn, light_3 = rng.random() < 0.5, float(rng.uniform(-25, 25)), _light(rng)

    box = (left, top, right, bottom)
    colours = _open(cut.photograph.image).crop(box).resize(shape, Image.Resampling.LANCZOS)
    cover = Image.fromarray(mask_HW[top:bottom, left:right].astype(np.uint8) * 255)
    cover = cover.resize(shape, Image.Resampling.BOX)
    if mirrored:
        colours, cover = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (colours, cover))
    colours = colours.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    cover = cover.rotate(turn, Image.Resampling.BILINEAR, expand=True)
    soft = cover.filter(ImageFilter.GaussianBlur(0.7))
    provenance = {
        **_source(cut.photograph, cut.annotation, pasted=True),
        "scale": round(scale, 4),
        "turn": round(turn, 2),
        "mirrored": mirrored,
        "light": _rounded(light_3),
    }
    return _Sprite(
        np.asarray(colours, dtype=np.float32) * light_3,
        np.asarray(soft, dtype=np.float32) / 255.0,
        np.asarray(cover) >= 128,
        provenance,
    )


_open = lru_cache(maxsize=32)(open_image)


def _light(rng: np.random.Generator) -> np.ndarray:
    """Factors of the three colours: brighter or darker, a little tinted."""
    return (rng.uniform(0.75, 1.2) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)


def _rounded(light_3: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in light_3]


def _source(photograph: _Photograph, annotation: dict[str, Any], pasted: bool) -> dict[str, Any]:
    return {
        "image": photograph.image.name,
        "image_id": photograph.image_id,
        "annotation_id": annotation["id"],
        "pasted": pasted,
    }


def _is_seen(placed: _Placed) -> bool:
    """Whether an object is still visible, or might be if it has no outline."""
    return placed.mask_HW is None or bool(placed.mask_HW.any())


def _annotation(placed: _Placed) -> dict[str, Any]:
    record = {
        "category_id": placed.category_id,
        "iscrowd": placed.crowd,
        "provenance": placed.provenance,
    }
    if placed.mask_HW is None:
        return {**record, "segmentation": [], "area": 0.0, "bbox": [0, 0, 0, 0]}
    left, top, right, bottom = box_of_mask(placed.mask_HW)
    return {
        **record,
        "segmentation": encode_rle(placed.mask_HW),
        "area": float(placed.mask_HW.sum()),
        "bbox": [left, top, right - left, bottom - top],
    }


# --- Files ---------------------------------------------------------------------------------------


def compose_images(
    album: Album, composed: ComposedImages, size: int, folder: Path, workers: int
) -> Path:
    """Make all compositions, images/<image_id>.jpg and instances.json in COCO's format, unless
    `folder` exists; it appears completely or not at all. Returns the folder.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    chunks = [
        range(start, min(start + _CHUNK, composed.images))
        for start in range(0, composed.images, _CHUNK)
    ]
    annotations: list[dict[str, Any]] = []
    work = (partial / "images", album, composed, size)
    with tqdm(total=composed.images, desc="composing images", unit="image") as progress:
        for chunk, made in zip(
            chunks, ordered_map(_compose_images, work, chunks, workers), strict=True
        ):
            annotations += [
                {**annotation, "id": number}
                for number, annotation in enumerate(made, start=len(annotations) + 1)
            ]
            progress.update(len(chunk))
    images = [
        {"id": number, "file_name": f"{number}.jpg", "width": size, "height": size}
        for number in range(1, composed.images + 1)
    ]
    content = {
        "info": {"description": f"Compositions of the objects of {album.coco.file.name}"},
        "images": images,
        "annotations": annotations,
        "categories": album.coco.dataset["categories"],
    }
    write_json(partial / "instances.json", content)
    os.replace(partial, folder)
    return folder


def _compose_images(
    work: tuple[Path, Album, ComposedImages, int], numbers: range
) -> list[dict[str, Any]]:
    folder, album, composed, size = work
    annotations = []
    for index in numbers:
        image, of_image = compose(album, composed, size, index)
        image.save(folder / f"{index + 1}.jpg", quality=95, subsampling=0)
        annotations += [{**annotation, "image_id": index + 1} for annotation in of_image]
    return annotations
