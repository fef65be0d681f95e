"""Regions in a compact form: arrays in memory, or files that all processes of a machine map.

A data set of the size of Visual Genome has millions of regions, of a kilobyte each as objects of
Python. Here a region is a few numbers, by which episodes are drawn, and a row of JSON of some
hundred bytes, from which the object is made when it is asked for. Images, and what is described in
them, stand once for all of their regions.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from icl_moe.boxes import Box
from icl_moe.tasks.captioning import CaptionTarget
from icl_moe.tasks.segmentation import MaskTarget
from icl_moe.tasks.semantic_segmentation import ClassesTarget
from preprocessing.pool import ROLES, ImageFile, PoolRegion, RegionKeys, Role, StoredRegions

_NUMBERS = ("image", "category", "style", "origin", "group", "role", "objects")
"""The columns that hold a number for each region: the number of its image, of a name, of its role,
or of its row in `described`.
"""

_MASK, _CLASSES = -1, -2
"""These stand instead of a row of `described` if the target is a mask, or the masks of several
classes.
"""

_TEXTS = ("rows", "images", "described")
"""Texts, one after another, with the end of each under NAME_ends."""


class RegionTable(StoredRegions):
    """Regions as columns; see `_NUMBERS` and `_TEXTS`. chosen: the rows that are regions of this
    table, in order; others are left out.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], names: Sequence[str], chosen: np.ndarray
    ) -> None:
        self._columns, self._names, self._chosen = dict(columns), list(names), chosen
        self._texts = {name: _Texts(columns[name], columns[f"{name}_ends"]) for name in _TEXTS}
        self._image = lru_cache(maxsize=4096)(self._read_image)

    # The pool's interface ----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, number: int) -> PoolRegion: ...

    @overload
    def __getitem__(self, number: slice) -> list[PoolRegion]: ...

    def __getitem__(self, number: int | slice) -> PoolRegion | list[PoolRegion]:
        if isinstance(number, slice):
            return [self._region(row) for row in self._chosen[number].tolist()]
        return self._region(int(self._chosen[number]))

    def __iter__(self) -> Iterator[PoolRegion]:
        for start in range(0, len(self), 4096):
            yield from self[start : start + 4096]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(PoolRegion.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def keys(self) -> RegionKeys:
        numbers: dict[str, int] = {}
        of_image = np.array(
            [numbers.setdefault(self._image(n).name, len(numbers)) for n in range(self._images)],
            dtype=np.int64,
        )
        of_name = np.array(
            [numbers.setdefault(name, len(numbers)) for name in self._names], dtype=np.int64
        )
        origin = self._column("origin")
        has_origin = np.array([bool(name) for name in self._names], dtype=bool)[origin]
        return RegionKeys(
            self._names,
            self._column("category").astype(np.int64),
            self._column("style").astype(np.int64),
            np.where(has_origin, of_name[origin], of_image[self._column("image")]),
            self._column("role").astype(np.int64),
        )

    def select(self, numbers: np.ndarray) -> "RegionTable":
        return RegionTable(self._columns, self._names, self._chosen[numbers])

    # What only tables can do -------------------------------------------------------------------

    @property
    def _images(self) -> int:
        return len(self._columns["images_ends"])

    def images(self) -> list[ImageFile]:
        """The images of its rows, in the order in which the source has them."""
        return [self._read_image(number) for number in range(self._images)]

    def image_numbers(self) -> np.ndarray:
        """The number of each region's image in `images`, int32 (regions,)."""
        return self._column("image")

    def with_role(self, role: Role) -> "RegionTable":
        column = np.full_like(self._columns["role"], ROLES.index(role))
        return RegionTable({**self._columns, "role": column}, self._names, self._chosen)

    def with_groups(self, groups: Mapping[str, str]) -> "RegionTable":
        """The same regions, each with the group of its class."""
        names = list(dict.fromkeys([*self._names, *groups.values(), ""]))
        of_name = np.array([names.index(groups.get(name, "")) for name in names], dtype=np.int32)
        column = of_name[self._columns["category"]]
        return RegionTable({**self._columns, "group": column}, names, self._chosen)

    def digest(self) -> str:
        """A hash of the regions and their order."""
        digest = hashlib.sha256(json.dumps(self._names).encode())
        for name, column in (*sorted(self._columns.items()), ("chosen", self._chosen)):
            digest.update(f"{name} {len(column)}".encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, column in {**self._columns, "chosen": self._chosen}.items():
            np.save(folder / f"{name}.npy", column, allow_pickle=False)
        (folder / "names.json").write_text(json.dumps(self._names), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> "RegionTable":
        """A table that `save` wrote; its arrays stay on the disk and are shared by processes."""
        names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
        columns = {path.stem: mapped(path) for path in sorted(folder.glob("*.npy"))}
        return cls(columns, names, columns.pop("chosen"))

    @classmethod
    def of(cls, regions: Iterable[PoolRegion]) -> "RegionTable":
        """Raises TypeError if a target is not of the tasks of this package."""
        if isinstance(regions, cls):
            return regions
        writer = TableWriter()
        for region in regions:
            writer.add(region)
        return writer.table()

    @classmethod
    def concatenate(cls, tables: Sequence["RegionTable"]) -> "RegionTable":
        """The regions of several tables, one after another."""
        names: dict[str, int] = {}
        parts: dict[str, list[np.ndarray]] = {}
        chosen, rows = [], 0
        places = dict.fromkeys(("rows", "images", "described"), 0)
        bytes_before = dict.fromkeys(_TEXTS, 0)
        for table in tables or [TableWriter().table()]:
            columns = table._columns
            of_name = np.array(
                [names.setdefault(name, len(names)) for name in table._names] or [0], dtype=np.int32
            )
            for name in ("category", "style", "origin", "group"):
                parts.setdefault(name, []).append(of_name[columns[name]])
            parts.setdefault("role", []).append(columns["role"])
            parts.setdefault("image", []).append(columns["image"] + np.int32(places["images"]))
            objects = columns["objects"]
            moved = np.where(objects < 0, objects, objects + np.int32(places["described"]))
            parts.setdefault("objects", []).append(moved)
            chosen.append(table._chosen + rows)
            rows += len(columns["image"])
            for name in _TEXTS:
                ends = columns[f"{name}_ends"]
                parts.setdefault(name, []).append(columns[name])
                parts.setdefault(f"{name}_ends", []).append(ends + bytes_before[name])
                places[name] += len(ends)
                bytes_before[name] += len(columns[name])
        joined = {}
        for name in list(parts):
            joined[name] = np.concatenate(parts.pop(name))
        return cls(joined, list(names), np.concatenate(chosen))

    def _column(self, name: str) -> np.ndarray:
        return self._columns[name][self._chosen]

    def _name(self, column: str, row: int) -> str:
        return self._names[self._columns[column][row]]

    def _read_image(self, number: int) -> ImageFile:
        path, name, width, height = json.loads(self._texts["images"][number])
        return ImageFile(Path(path), name, width, height)

    def _region(self, row: int) -> PoolRegion:
        annotations, crop, scale, instance, provenance, *packed = json.loads(
            self._texts["rows"][row]
        )
        category = self._name("category", row)
        objects = int(self._columns["objects"][row])
        target: MaskTarget | ClassesTarget | CaptionTarget
        if objects == _MASK:
            target = _mask_target(category, *packed)
        elif objects == _CLASSES:
            target = _classes_target(*packed)
        else:
            target = _caption_target(Described(self._texts["described"][objects]), *packed)
        left, top, right, bottom = crop
        return PoolRegion(
            self._image(int(self._columns["image"][row])),
            category,
            tuple(annotations),
            (left, top, right, bottom),
            scale,
            target,
            self._name("style", row),
            self._name("origin", row),
            None if instance is None else (instance[0], instance[1]),
            tuple(provenance),
            ROLES[self._columns["role"][row]],
            self._name("group", row),
        )

    def __getstate__(self) -> tuple[Any, ...]:
        return self._columns, self._names, self._chosen

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        RegionTable.__init__(self, *state)


class TableWriter:
    """Collects the regions of a table. Those of one image should be consecutive."""

    def __init__(self) -> None:
        self._numbers = {name: array("i") for name in _NUMBERS}
        self._texts: dict[str, list[bytes]] = {name: [] for name in _TEXTS}
        self._names: dict[str, int] = {}
        self._images: dict[ImageFile, int] = {}
        self._described: dict[int, tuple[int, Any]] = {}

    def add(self, region: PoolRegion) -> None:
        if isinstance(region.target, CaptionTarget):
            objects = self._add_described(region.target.objects)
            packed = _packed_caption(region.target)
        elif isinstance(region.target, MaskTarget):
            objects, packed = _MASK, _packed_mask(region.category, region.target)
        elif isinstance(region.target, ClassesTarget):
            objects, packed = _CLASSES, _packed_classes(region.target)
        else:
            raise TypeError(f"no table holds {type(region.target).__name__}")
        names, image = self._names, self.add_image(region.image)
        for column, number in (
            ("image", image),
            ("category", names.setdefault(region.category, len(names))),
            ("style", names.setdefault(region.style, len(names))),
            ("origin", names.setdefault(region.origin, len(names))),
            ("group", names.setdefault(region.group, len(names))),
            ("role", ROLES.index(region.role)),
            ("objects", objects),
        ):
            self._numbers[column].append(number)
        row = (
            region.annotations,
            region.crop,
            region.scale,
            region.instance,
            region.provenance,
            *packed,
        )
        self._texts["rows"].append(_json(row))

    def add_image(self, image: ImageFile) -> int:
        """The number of an image, which may have no region."""
        number = self._images.setdefault(image, len(self._images))
        if number == len(self._texts["images"]):
            values = (str(image.path), image.name, image.width, image.height)
            self._texts["images"].append(_json(values))
        return number

    def table(self) -> RegionTable:
        columns = {
            name: np.array(numbers, dtype=np.int32) for name, numbers in self._numbers.items()
        }
        for name, texts in self._texts.items():
            columns[name] = np.frombuffer(b"".join(texts), dtype=np.uint8)
            columns[f"{name}_ends"] = np.cumsum([*map(len, texts)], dtype=np.int64)
        return RegionTable(columns, list(self._names), np.arange(len(columns["image"])))

    def _add_described(self, objects: Sequence[Any]) -> int:
        """The number of what is described in an image; its regions share one object, which is kept
        so that no other can have its identity.
        """
        described = self._texts["described"]
        number, _ = self._described.setdefault(id(objects), (len(described), objects))
        if number == len(described):
            described.append(_json(list(objects)))
        return number


class Described(Sequence[tuple[str, str, str, Box]]):
    """The entries of `CaptionTarget.objects`. They are read when they are needed, which is only for
    queries.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def _all(self) -> tuple[tuple[str, str, str, Box], ...]:
        return tuple(
            (name, style, caption, (x1, y1, x2, y2))
            for name, style, caption, (x1, y1, x2, y2) in json.loads(self._text)
        )

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[tuple[str, str, str, Box]]:
        return iter(self._all())

    def __getitem__(self, number: Any) -> Any:
        return self._all()[number]

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Described) else other)

    def __hash__(self) -> int:
        return hash(self._all())


class _Texts:
    """Texts of one array, and the end of each."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self._data, self._ends = np.asarray(data).data, ends

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        return str(self._data[start : int(self._ends[number])], "ascii")


def mapped(path: Path) -> np.ndarray:
    """The array in a file of NumPy, which stays on the disk."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError:  # An empty array cannot be mapped.
        return np.load(path, allow_pickle=False)


def _json(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode("ascii")


def _packed_mask(category: str, target: MaskTarget) -> tuple[Any, ...]:
    """A mask target as a row of plain values. The run lengths of the mask are usually those of one
    of the image's objects, and are then not stored again.
    """
    counts = None if (category, target.counts) in target.objects else target.counts.decode("ascii")
    objects = [(name, counts.decode("ascii")) for name, counts in target.objects]
    return (objects, counts, target.ignored.decode("ascii"))


def _mask_target(category: str, packed: list[Any], counts: str | None, ignored: str) -> MaskTarget:
    objects = tuple((name, counts.encode("ascii")) for name, counts in packed)
    own = dict(objects)[category] if counts is None else counts.encode("ascii")
    return MaskTarget(own, objects, ignored.encode("ascii"))


def _packed_classes(target: ClassesTarget) -> tuple[Any, ...]:
    masks = [(name, counts.decode("ascii")) for name, counts in target.masks]
    return (masks, target.colours)


def _classes_target(masks: list[Any], colours: list[str]) -> ClassesTarget:
    return ClassesTarget(
        tuple((name, counts.encode("ascii")) for name, counts in masks), tuple(colours)
    )


def _packed_caption(target: CaptionTarget) -> tuple[Any, ...]:
    references = None if target.references == (target.caption,) else target.references
    return (target.box, target.caption, references)


def _caption_target(
    objects: Sequence[tuple[str, str, str, Box]],
    box: list[float],
    caption: str,
    references: list[str] | None,
) -> CaptionTarget:
    x1, y1, x2, y2 = box
    others = (caption,) if references is None else tuple(references)
    return CaptionTarget((x1, y1, x2, y2), caption, others, objects)
