"""Visual Genome -> the captioning pool: region descriptions that name a class, joined to an object
of that class.

Regions carry no class. A region has class c if its phrase names c and the same image has an object
named c whose box overlaps the region's box by at least half (intersection over union); of several
such classes, it has the one that overlaps most. So "a man in a red shirt" around the man has class
person, and "man is wearing sneakers" around his feet has none. Singulars, plurals and the synonyms
of classes.py count. The files are those of versions 1.2 and 1.4; they are read piece by piece,
since the largest has 0.7 GB.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import unquote

import numpy as np
from tqdm import tqdm

from icl_moe.boxes import Box, box_iou, normalise_box
from icl_moe.errors import InputError, shown
from icl_moe.inputs import (
    JSONDecoder,
    check_is_file,
    json_encoding,
    json_error,
    other_kind_of,
    read_json,
    with_whole_characters,
)
from preprocessing.caption_regions import (
    caption_region,
    clean_phrase,
    drop_rare_classes,
    frequent_classes,
    with_objects,
)
from preprocessing.classes import COCO_CLASSES, ClassFinder, plural
from preprocessing.image_check import UsableImages, is_file
from preprocessing.json_stream import NotPlainError, decode_piece, list_pieces
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import CaptioningSource
from preprocessing.records import image_file, is_id, kinds_of_id, read_rect
from preprocessing.region_table import RegionTable, TableWriter
from preprocessing.workers import ordered_map

_Record = tuple[str, Any, list[Any]]
"""The record of an image: its name for error messages, the image's id, and the list of entries."""

LEAST_OVERLAP = 0.5
_READ_CHARACTERS = 1 << 22
_GAP = re.compile(r"[\s,]*")


def read_captioning(source: CaptioningSource, usable: UsableImages, workers: int = 0) -> Pool:
    """The captioning pool of Visual Genome's image_data, objects and region_descriptions, read by
    `workers` processes. Raises InputError for bad input.
    """
    finder = ClassFinder(source.classes or COCO_CLASSES)
    pool = Pool("captioning", [])
    images = _read_images(source.path("image_data"), source.path("images"))
    used = counted = set(images)
    if source.split is not None:
        used = counted = _read_split(source, source.split, images, pool.skipped)
    if source.counted_split is not None:
        counted = _read_split(source, source.counted_split, images, Counter())
    objects = _Objects()
    reader = _ObjectsReader(source.path("objects"), images, finder)
    for found in _read_records(reader, workers, pool.skipped):
        objects.add(found)
    regions = _RegionsReader(source.path("regions"), images, finder, used, counted, objects)
    table = RegionTable.concatenate(list(_read_records(regions, workers, pool.skipped)))
    of_image = table.images()
    names = {images[number].name for number in counted}
    is_counted = np.array([image.name in names for image in of_image], dtype=bool)
    names = {images[number].name for number in used}
    items = [_Shown(image) for image in of_image if image.name in names]
    kept = {item.image.name for item in usable.keep(items, source.path("images"), pool)}
    is_kept = np.array([image.name in kept for image in of_image], dtype=bool)
    pool.regions = table.select(is_kept[table.image_numbers()])
    pool.count_classes_without_a_region(source.classes)
    if source.counted_split is None:
        drop_rare_classes(pool, source.min_descriptions)
    else:
        whole = Pool("captioning", table.select(is_counted[table.image_numbers()]))
        rare = set(pool.class_counts()) - frequent_classes(whole, source.min_descriptions)
        pool.drop_classes(rare, "classes_with_too_few_descriptions")
    return pool


@dataclass(frozen=True, slots=True)
class _Shown:
    """An image that has regions."""

    image: ImageFile


def frequent_names(file: Path, more_than: int) -> list[str]:
    """The names of more than so many objects of an objects file that none of COCO's classes has,
    in alphabetical order; of a name and its plural, the name.
    """
    finder, counts = ClassFinder(COCO_CLASSES), Counter[str]()
    for record in read_json_list(file):
        entries = record.get("objects") if isinstance(record, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            names = entry.get("names") if isinstance(entry, dict) else None
            counts.update(str(name).strip().lower() for name in names or ())
    found = {
        name
        for name, count in counts.items()
        if count > more_than and re.fullmatch("[a-z]+( [a-z]+)*", name) and not finder.exact(name)
    }
    return sorted(found - {plural(name) for name in found})


def read_json_list(file: Path) -> Iterator[Any]:
    """Iterate over the entries of a JSON file that is one list, with only one entry in memory at a
    time. Raises the same errors as `read_json`.
    """
    check_is_file(file)
    if kind := other_kind_of(file):
        raise InputError(f"{file} is {kind}.")
    try:
        with (
            file.open("rb") as start,
            file.open(encoding=json_encoding(start.read(4))) as stream,
            tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True) as progress,
        ):
            yield from _entries_of_list(file, stream, progress)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not valid JSON: it is not text in UTF-8.") from error
    except OSError as error:
        raise InputError(f"The file {file} cannot be read: {error.strerror}.") from error


def _entries_of_list(file: Path, stream: TextIO, progress: Any) -> Iterator[Any]:
    decoder = JSONDecoder()
    text, position, count = "", 0, -1  # count is -1 before the opening bracket
    while True:
        position = _GAP.match(text, position).end()  # type: ignore[union-attr]
        if count < 0 and position < len(text) and text[position] != "[":
            raise InputError(f"{file} is not a list of records, as in Visual Genome's files.")
        try:
            if count < 0 and text.startswith("[", position):
                position, count = position + 1, 0
            elif count >= 0 and text.startswith("]", position):
                break
            else:
                entry, end = decoder.raw_decode(text, position)
                count += 1
                yield with_whole_characters(entry, text, position, end)
                position = end
        except json.JSONDecodeError:
            # The entry is incomplete or malformed; more text will tell. The text is at least
            # doubled, so that a long entry is not decoded over and over.
            more = stream.read(max(_READ_CHARACTERS, len(text) - position))
            if not more and count < 0:
                raise InputError(f"The file {file} is empty; it must be JSON.") from None
            if not more:
                raise InputError(
                    f"{file} is not valid JSON, a list of records, after its entry {count}."
                ) from None
            progress.update(len(more))
            text, position = text[position:] + more, 0
        except (ValueError, RecursionError) as error:
            raise json_error(file, error) from error
    if text[position + 1 :].strip() or stream.read(_READ_CHARACTERS).strip():
        raise InputError(
            f"{file} is not valid JSON: something follows after the list of {count} records, such "
            "as a second list."
        )


def _read_images(file: Path, folder: Path) -> dict[Any, ImageFile]:
    """Image id -> its file."""
    images: dict[Any, ImageFile] = {}
    ids: dict[str, Any] = {}
    for record in read_json_list(file):
        if not isinstance(record, dict) or not is_id(record.get("image_id")):
            raise InputError(
                f"{file} has a record without 'image_id'; it must have the layout of Visual Genome "
                "1.2 or 1.4, not that of 1.0."
            )
        number = record["image_id"]
        where = f"{file}: image {number}"
        if number in images:
            raise InputError(f"{where} occurs twice; each image may have only one record.")
        name = _image_name(folder, record.get("url") or f"{number}.jpg", where)
        image = image_file(folder, name, record.get("width"), record.get("height"), where)
        if ids.setdefault(image.name, number) != number:
            raise InputError(
                f"{where} has the file name {image.name} of image {ids[image.name]}; each file may "
                "have only one record."
            )
        images[number] = image
    return images


def _read_split(
    source: CaptioningSource, name: str, images: dict[Any, ImageFile], skipped: Counter[str]
) -> set[Any]:
    """The images of one of the recipe's splits. Raises InputError if its ids do not occur in
    image_data.
    """
    file = source.path("splits")
    splits = read_json(file)
    if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
        raise InputError(f"{file} has no list of image ids named '{name}'.")
    split = splits[name]
    for number in split:
        if not is_id(number) or (number not in images and kinds_of_id(images, number)):
            raise InputError(
                f"{file}: '{name}' has the image id {shown(number)}, but the ids of "
                f"{source.image_data} look like {shown(next(iter(images), 1))}."
            )
    used = set(split) & set(images)
    if not used:
        raise InputError(
            f"{file}: none of the {len(split)} images of '{name}' is in {source.image_data}."
        )
    skipped["images_of_the_split_without_a_record"] += len(set(split) - used)
    return used


def _image_name(folder: Path, url: Any, where: str) -> str:
    """An image's path: in the folder itself, or in VG_100K or VG_100K_2, as the archives unpack."""
    if not isinstance(url, str):
        raise InputError(f"{where} has the url {shown(url)}; it must be text.")
    *_, part, name = ("", *url.split("/"))
    if "%" in name and not is_file(folder / name):
        name = unquote(name)
    if part in ("VG_100K", "VG_100K_2") and not is_file(folder / name):
        return f"{part}/{name}"
    return name


# --- Records of images, on several processes -----------------------------------------------------


class _RecordReader(Protocol):
    """Reads the records of a file, one for each image. key: the key of a record's list of
    entries.
    """

    @property
    def file(self) -> Path: ...

    @property
    def key(self) -> str: ...

    @property
    def images(self) -> dict[Any, ImageFile]: ...

    def read(self, records: Iterable[_Record], skipped: Counter[str]) -> Any:
        """What some records hold. skipped: counts what is left out."""
        ...


def _read_records(reader: _RecordReader, workers: int, skipped: Counter[str]) -> Iterator[Any]:
    """What the records of a file hold, part by part.

    Processes read pieces of the file. If one of them finds anything wrong, the file is read again
    from its beginning, one record after another, which tells what is wrong first.
    """
    check_is_file(reader.file)
    found, left_out, seen = [], Counter[str](), set[Any]()
    try:
        for part in ordered_map(_read_piece, reader, list_pieces(reader.file), workers):
            if part is None or not seen.isdisjoint(part.numbers):
                raise NotPlainError
            seen.update(part.numbers)
            left_out.update(part.skipped)
            found.append(part.content)
    except (NotPlainError, OSError):
        left_out = Counter()
        found = [reader.read(_records(reader), left_out)]
    skipped.update(left_out)
    yield from found


@dataclass(frozen=True)
class _Part:
    """What a piece holds, the ids of its images, and what is left out."""

    content: Any
    numbers: list[Any]
    skipped: Counter[str]


def _read_piece(reader: _RecordReader, piece: bytes) -> _Part | None:
    """What a piece of a file holds; None if anything in it is wrong."""
    skipped = Counter[str]()
    try:
        records = [_record(reader, record) for record in decode_piece(piece)]
        numbers = [number for _, number, _ in records]
        if len({*numbers}) < len(numbers):
            return None
        return _Part(reader.read(records, skipped), numbers, skipped)
    except (NotPlainError, InputError):
        return None


@dataclass(frozen=True)
class _ObjectsReader:
    """Reads the objects that have a class."""

    file: Path
    images: dict[Any, ImageFile]
    finder: ClassFinder
    key: str = "objects"

    def read(
        self, records: Iterable[_Record], skipped: Counter[str]
    ) -> list[tuple[Any, tuple[str, ...], np.ndarray]]:
        """For each image its id, and the classes and boxes (objects, 4) of its objects."""
        found = []
        for where, number, entries in records:
            kept = list(self._objects(where, entries, self.images[number], skipped))
            boxes = np.array([box for _, box in kept], dtype=np.float64).reshape(-1, 4)
            found.append((number, tuple(category for category, _ in kept), boxes))
        return found

    def _objects(
        self, where: str, entries: list[Any], image: ImageFile, skipped: Counter[str]
    ) -> Iterator[tuple[str, Box]]:
        for entry in entries:
            names = entry.get("names") if isinstance(entry, dict) else None
            if not isinstance(names, list):
                raise InputError(
                    f"{where} has an object without 'names'; it must have the layout of Visual "
                    "Genome 1.2 or 1.4."
                )
            exact = self.finder.exact
            category = next((found for name in names if (found := exact(str(name)))), None)
            if category is not None:
                where_object = f"{where}, object {shown(entry.get('object_id'))}"
                box = _box(where_object, entry, ("w", "h"), image, skipped)
                if box is not None:
                    yield category, box


class _Objects:
    """The classes and boxes of the objects of each image."""

    def __init__(self) -> None:
        self._of_image: dict[Any, tuple[tuple[str, ...], np.ndarray]] = {}

    def add(self, found: list[tuple[Any, tuple[str, ...], np.ndarray]]) -> None:
        for number, classes, boxes in found:
            self._of_image[number] = (tuple(map(sys.intern, classes)), boxes)

    def of_image(self, number: Any) -> list[tuple[str, Box]]:
        classes, boxes = self._of_image.get(number, ((), _NO_BOXES))
        return [
            (category, (x1, y1, x2, y2))
            for category, (x1, y1, x2, y2) in zip(classes, boxes.tolist(), strict=True)
        ]


_NO_BOXES = np.zeros((0, 4))


@dataclass(frozen=True)
class _RegionsReader:
    """Reads the regions of `used` and `counted` images that have a class, and counts what is left
    out of `used` ones.
    """

    file: Path
    images: dict[Any, ImageFile]
    finder: ClassFinder
    used: set[Any]
    counted: set[Any]
    objects: _Objects
    key: str = "regions"

    def read(self, records: Iterable[_Record], skipped: Counter[str]) -> RegionTable:
        writer = TableWriter()
        for where, number, entries in records:
            if number in self.used or number in self.counted:
                left_out = skipped if number in self.used else Counter[str]()
                for region in with_objects(self._regions(where, number, entries, left_out)):
                    writer.add(region)
        return writer.table()

    def _regions(
        self, where: str, number: Any, entries: list[Any], left_out: Counter[str]
    ) -> Iterator[PoolRegion]:
        image, objects, seen = self.images[number], self.objects.of_image(number), set()
        for entry in entries:
            region_id = entry.get("region_id") if isinstance(entry, dict) else None
            if not is_id(region_id):
                raise InputError(
                    f"{where} has a region without 'region_id'; it must have the layout of Visual "
                    "Genome 1.2 or 1.4."
                )
            where_region = f"{where}, region {region_id}"
            phrase = _phrase(entry, where_region)
            box = _box(where_region, entry, ("width", "height"), image, left_out)
            if entry.get("image_id") not in (None, number):
                left_out["regions_of_another_image"] += 1
            elif region_id in seen:
                left_out["regions_with_the_id_of_another"] += 1
            elif box is not None:
                seen.add(region_id)
                category = _class_of(self.finder.find(phrase), box, objects)
                if category is None:
                    left_out["regions_without_a_class"] += 1
                    continue
                region = caption_region(image, category, region_id, box, phrase, (phrase,))
                assert region is not None, "an empty box overlaps nothing"
                yield region


def _class_of(named: dict[str, bool], box: Box, objects: list[tuple[str, Box]]) -> str | None:
    overlaps = [(box_iou(box, other), category) for category, other in objects if category in named]
    overlap, category = max(overlaps, default=(0.0, None))
    return category if overlap >= LEAST_OVERLAP else None


def _records(reader: _RecordReader) -> Iterator[_Record]:
    """The records of a file, one after another."""
    seen = set()
    for record in read_json_list(reader.file):
        where, number, entries = _record(reader, record)
        if number in seen:
            raise InputError(
                f"{reader.file} has two records of image {number}; each image may have only one "
                "record."
            )
        seen.add(number)
        yield where, number, entries


def _record(reader: _RecordReader, record: Any) -> _Record:
    file, key, images = reader.file, reader.key, reader.images
    number = record.get("image_id", record.get("id")) if isinstance(record, dict) else None
    if not is_id(number) or not isinstance(record.get(key), list):
        raise InputError(
            f"{file} has a record without an image's id and its list of {key}; it must have "
            "Visual Genome's layout."
        )
    if number not in images:
        raise InputError(
            f"{file} has {key} of image {shown(number)}, which image_data "
            f"lacks{kinds_of_id(images, number)}."
        )
    return f"{file}: image {number}", number, record[key]


def _phrase(entry: dict[str, Any], where: str) -> str:
    phrase = entry.get("phrase", 0)
    if phrase is not None and not isinstance(phrase, str):
        raise InputError(f"{where} has no text as its 'phrase'.")
    return clean_phrase(phrase)


def _box(
    where: str,
    entry: dict[str, Any],
    sides: tuple[str, str],
    image: ImageFile,
    skipped: Counter[str],
) -> Box | None:
    rect = read_rect([entry.get(key) for key in ("x", "y", *sides)], image, where, skipped)
    if rect is None:
        return None
    box = normalise_box(*rect, image.width, image.height)
    if box[0] == box[2] or box[1] == box[3]:
        skipped["empty_boxes"] += 1
        return None
    return box
