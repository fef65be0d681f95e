"""Visual Genome -> the captioning pool: region descriptions that name a class, joined to an object
of that class.

Regions carry no class. A region is of class c where its phrase names c and the same image has an
object named c whose box overlaps the region's box by at least half (intersection over union); of
several classes, the one that overlaps most. So "a man in a red shirt" around the man is of class
person, and "man is wearing sneakers" around his feet is of none. Names count in the singular, the
plural and by the synonyms of classes.py. Files are those of versions 1.2 and 1.4, read piece by
piece: the largest has 0.7 GB.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from icl_moe.boxes import Box, box_iou, normalise_box
from icl_moe.errors import InputError
from preprocessing.classes import COCO_CLASSES, ClassFinder
from preprocessing.coco import read_json
from preprocessing.pool import ImageFile, Pool, Region, image_file, keep_present
from preprocessing.recipe import CaptioningSource

LEAST_OVERLAP = 0.5
_READ_CHARACTERS = 1 << 22
_GAP = re.compile(r"[\s,]*")


def read_captioning(source: CaptioningSource, missing_images: Literal["stop", "skip"]) -> Pool:
    """The captioning pool of Visual Genome's image_data, objects and region_descriptions. Raises
    InputError for bad input.
    """
    finder = ClassFinder(source.classes or COCO_CLASSES)
    images = _read_images(source.path("image_data"), source.path("images"))
    used = (
        set(images) if source.splits is None else _read_split(source.path("splits"), source.split)
    )
    objects = _read_objects(source.path("objects"), images, finder)
    pool = Pool("captioning", [])
    pool.regions += _read_regions(
        source.path("regions"), images, used, objects, finder, pool.skipped
    )
    pool.regions = keep_present(pool.regions, source.path("images"), missing_images, pool.skipped)
    drop_rare_classes(pool, source.min_descriptions)
    return pool


def clean_phrase(text: Any) -> str:
    """A description without outer and doubled space and without its last stop, which the sequence's
    template writes itself.
    """
    return " ".join(text.split()).rstrip(" .") if isinstance(text, str) else ""


def caption_region(
    image: ImageFile,
    category: str,
    annotation: int,
    box: Box,
    phrase: str,
    references: tuple[str, ...],
) -> Region | None:
    """A region of the captioning pool; None where the box is empty.

    It shows the whole image, stretched to a square as the paper's captions have it: each box is
    exact in fractions of its image, and an image is encoded once, however many regions it has.
    """
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    if area <= 0:
        return None
    crop = (0, 0, image.width, image.height)
    return Region(
        image, category, (annotation,), crop, area, box=box, caption=phrase, references=references
    )


def drop_rare_classes(pool: Pool, min_descriptions: int) -> None:
    """Leave out classes that do not have more than `min_descriptions` regions."""
    counts = Counter(region.category for region in pool.regions)
    pool.drop_classes(
        {category for category, count in counts.items() if count <= min_descriptions},
        "classes_with_too_few_descriptions",
    )


def read_json_list(file: Path) -> Iterator[Any]:
    """The entries of a JSON file that is one list, one after another, so that only one is held at a
    time.
    """
    if not file.is_file():
        raise InputError(f"The file {file} does not exist.")
    decoder = json.JSONDecoder()
    with (
        file.open(encoding="utf-8") as stream,
        tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True) as progress,
    ):
        text, position, count = "", 0, -1  # count is -1 before the list's bracket
        while True:
            position = _GAP.match(text, position).end()  # type: ignore[union-attr]
            try:
                if count < 0 and text.startswith("[", position):
                    position, count = position + 1, 0
                elif count >= 0 and text.startswith("]", position):
                    return
                elif count < 0 and position < len(text):
                    break
                else:
                    entry, position = decoder.raw_decode(text, position)
                    count += 1
                    yield entry
            except json.JSONDecodeError:
                # Not whole yet, or malformed; what follows tells.
                more = _read(stream)
                if not more:
                    break
                progress.update(len(more))
                text, position = text[position:] + more, 0
    raise InputError(
        f"{file} is not valid JSON, a list of records, after its entry {max(count, 0)}."
    )


def _read(stream: TextIO) -> str:
    try:
        return stream.read(_READ_CHARACTERS)
    except UnicodeDecodeError:
        return ""


def _read_images(file: Path, folder: Path) -> dict[int, ImageFile]:
    images = {}
    for record in read_json_list(file):
        if not isinstance(record, dict) or "image_id" not in record:
            raise InputError(
                f"{file} has a record without 'image_id': the layout of Visual Genome 1.2 or 1.4 "
                "belongs there, not that of 1.0."
            )
        number = record["image_id"]
        name = _image_name(folder, str(record.get("url") or f"{number}.jpg"))
        images[number] = image_file(
            folder, name, record.get("width"), record.get("height"), f"{file}: image {number}"
        )
    return images


def _read_split(file: Path, name: str | None) -> set[int]:
    splits = read_json(file)
    if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
        raise InputError(f"{file} has no list of image ids named '{name}'.")
    return set(splits[name])


def _image_name(folder: Path, url: str) -> str:
    """Where an image lies: in the folder itself, or in VG_100K or VG_100K_2 as the archives
    unpack.
    """
    *_, part, name = ("", *url.split("/"))
    return (
        name
        if part not in ("VG_100K", "VG_100K_2") or (folder / name).is_file()
        else f"{part}/{name}"
    )


def _read_objects(
    file: Path, images: dict[int, ImageFile], finder: ClassFinder
) -> dict[int, list[tuple[str, Box]]]:
    """Image id -> (class, box) of the objects that have a class."""
    objects: dict[int, list[tuple[str, Box]]] = {}
    for record in read_json_list(file):
        where, number, entries = _entries(file, record, "objects", images)
        kept = objects.setdefault(number, [])
        for entry in entries:
            names = entry.get("names") if isinstance(entry, dict) else None
            if not isinstance(names, list):
                raise InputError(
                    f"{where} has an object without 'names': the layout of Visual Genome 1.2 or "
                    "1.4 belongs there."
                )
            category = next((found for name in names if (found := finder.exact(str(name)))), None)
            if category is not None:
                kept.append((category, _box(where, entry, "w", "h", images[number])))
    return objects


def _read_regions(
    file: Path,
    images: dict[int, ImageFile],
    used: set[int],
    objects: dict[int, list[tuple[str, Box]]],
    finder: ClassFinder,
    skipped: Counter[str],
) -> Iterator[Region]:
    """The regions of `used` images that have a class."""
    for record in read_json_list(file):
        where, number, entries = _entries(file, record, "regions", images)
        if number not in used:
            continue
        image = images[number]
        for entry in entries:
            if not isinstance(entry, dict) or "region_id" not in entry:
                raise InputError(
                    f"{where} has a region without 'region_id': the layout of Visual Genome 1.2 or "
                    "1.4 belongs there."
                )
            phrase = clean_phrase(entry.get("phrase"))
            box = _box(where, entry, "width", "height", image)
            category = _class_of(finder.find(phrase), box, objects.get(number, []))
            if category is None:
                skipped["regions_without_a_class"] += 1
                continue
            region = caption_region(image, category, entry["region_id"], box, phrase, (phrase,))
            assert region is not None, "an empty box overlaps nothing"
            yield region


def _class_of(named: dict[str, bool], box: Box, objects: list[tuple[str, Box]]) -> str | None:
    overlaps = [(box_iou(box, other), category) for category, other in objects if category in named]
    overlap, category = max(overlaps, default=(0.0, None))
    return category if overlap >= LEAST_OVERLAP else None


def _entries(
    file: Path, record: Any, key: str, images: dict[int, ImageFile]
) -> tuple[str, int, list[Any]]:
    """Of one image's record: its name for error messages, the image's id, and the list
    under `key`.
    """
    number = record.get("image_id", record.get("id")) if isinstance(record, dict) else None
    if number is None or not isinstance(record.get(key), list):
        raise InputError(
            f"{file} has a record without an image's id and its list of {key}: Visual Genome's "
            "layout belongs there."
        )
    if number not in images:
        raise InputError(f"{file} has {key} of image {number}, which image_data does not know.")
    return f"{file}: image {number}", number, record[key]


def _box(
    where: str, entry: dict[str, Any], width_key: str, height_key: str, image: ImageFile
) -> Box:
    values = [entry.get(key) for key in ("x", "y", width_key, height_key)]
    if not all(isinstance(value, int | float) for value in values):
        raise InputError(f"{where} has a box without x, y, {width_key} and {height_key}.")
    x, y, width, height = (float(value) for value in values)  # type: ignore[arg-type]
    return normalise_box(x, y, width, height, image.width, image.height)
