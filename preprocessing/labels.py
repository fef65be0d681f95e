"""The names file of a folder of masks: which class an id, or a colour, of a mask stands for.

Text has one class a line, in one of these forms (lines that begin with # are comments):

    cat                    its id is the number of the line; see `_numbered`
    3: cat                 an id, also with a comma
    cat: 128, 0, 0         a colour, also before the name, as #800000, or in the form of CVAT's
                           labelmap.txt (cat:128,0,0::) and of CamVid (128 0 0  cat)

JSON and YAML hold a list of names, ids with names ({3: cat}), names with ids ({cat: 3}), names with
colours ({cat: [128, 0, 0]}), or a list of records with `name` and `id` or `color`; all of these
also under the key `names`, as in YOLO's data.yaml.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError, shown
from icl_moe.inputs import check_is_file, read_json, whole_characters
from icl_moe.settings import read_yaml

Colour = tuple[int, int, int]

VOID = 255
"""The id of pixels that belong to no class for certain, such as the borders in Pascal VOC."""

_NO_CLASS = {"background", "_background_", "__background__", "bg", "unlabeled", "unlabelled"}
_NO_CLASS |= {"__ignore__", "_ignore_", "ignore", "void"}
_MOST_BYTES = 10_000_000


@dataclass(frozen=True)
class LabelTable:
    """Class of each id, or of each colour; background and void are None. Just one of them is
    filled.
    """

    file: Path
    ids: dict[int, str | None]
    colours: dict[Colour, str | None]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in the order of the file."""
        named = (*self.ids.values(), *self.colours.values())
        return tuple(dict.fromkeys(name for name in named if name is not None))


def read_labels(file: Path) -> LabelTable:
    """Read a names file. Raises InputError if it is missing, names no class, or is in no known
    form.
    """
    check_is_file(file)
    suffix = file.suffix.lower()
    if suffix == ".json":
        entries = _entries(file, read_json(file))
    elif suffix in (".yaml", ".yml"):
        entries = _entries(file, read_yaml(file, "The file"))
    else:
        entries = list(_lines(file))
    if not all(name.strip() for _, name in entries) or not entries:
        raise InputError(f"{file} has an empty name; it must hold one name a line.")
    kinds = {type(key) for key, _ in entries}
    if len(kinds) > 1:
        raise InputError(
            f"{file} gives some classes an id or a colour and others none; all must be alike."
        )
    if kinds == {type(None)}:
        entries = _numbered([name for _, name in entries])
    table = LabelTable(file, {}, {})
    for key, name in entries:
        target: dict[Any, str | None] = table.colours if isinstance(key, tuple) else table.ids
        if key in target:
            raise InputError(f"{file} names {_key(key)} twice.")
        name = whole_characters(name.strip())
        target[key] = None if name.lower() in _NO_CLASS else name
    if not table.classes:
        raise InputError(f"{file} names no class but background.")
    return table


_Entry = tuple[Any, str]
"""An id, a colour or None, and a name."""


def _numbered(names: list[str]) -> list[_Entry]:
    """Names without ids: the background, if it is the first, has the id 0, otherwise the first
    class has the id 1, since masks mark the background with 0.

    Before the background labelme's labels.txt has `__ignore__`, which no pixel of a mask has.
    """
    if names[0].strip().lower() == "__ignore__":
        names = names[1:]
    first = 0 if names and names[0].strip().lower() in _NO_CLASS else 1
    return list(enumerate(names, start=first))


_INTEGERS = r"(?P<r>\d{1,3})\s*[,\s]\s*(?P<g>\d{1,3})\s*[,\s]\s*(?P<b>\d{1,3})"
_LINES = {
    "name, colour": re.compile(rf"(?P<name>.*?\S)\s*[:,\s]\s*{_INTEGERS}\s*(?::.*)?"),
    "colour, name": re.compile(rf"{_INTEGERS}\s*[:,\s]\s*(?P<name>\S.*)"),
    "name, #": re.compile(r"(?P<name>.*?\S)\s*[:,\s]\s*#(?P<hex>[0-9a-fA-F]{6})"),
    "#, name": re.compile(r"#(?P<hex>[0-9a-fA-F]{6})\s*[:,\s]\s*(?P<name>\S.*)"),
    "id, name": re.compile(r"(?P<id>\d{1,9})\s*[:,]\s*(?P<name>\S.*)"),
}
_NEARLY_A_COLOUR = re.compile(r".*\S\s*[:,]\s*#?[\d\s,]+")
_HEADER = re.compile(r"\s*(name|class|label|id|pixel value)\w*\s*,.*", re.IGNORECASE)


def _lines(file: Path) -> Iterable[_Entry]:
    lines = [line.strip() for line in _read_text(file).splitlines()]
    lines = [line for line in lines if line and not re.match(r"#(?![0-9a-fA-F]{6}\b)", line)]
    if len(lines) > 1 and _HEADER.fullmatch(lines[0]):
        lines = lines[1:]  # of a table, such as Roboflow's _classes.csv
    for form in _LINES.values():
        matches = [form.fullmatch(line) for line in lines]
        if lines and all(matches):
            return [_of_match(file, match) for match in matches if match]
    for line in lines:
        if _NEARLY_A_COLOUR.fullmatch(line):
            raise InputError(
                f"{file}: the line {shown(line)} is neither a name, nor an id and a name, nor a "
                "name with a colour of three levels; see docs/own_data.md."
            )
    return [(None, line) for line in lines]


def _of_match(file: Path, match: re.Match[str]) -> _Entry:
    groups = match.groupdict()
    if "id" in groups:
        return int(groups["id"]), groups["name"]
    value = f"#{groups['hex']}" if "hex" in groups else [int(groups[level]) for level in "rgb"]
    return _colour(file, value), groups["name"]


def _entries(file: Path, content: Any) -> list[_Entry]:
    """The classes of a JSON or YAML value."""
    if isinstance(content, dict) and isinstance(content.get("names"), dict | list):
        content = content["names"]
    if isinstance(content, dict):
        return [_of_pair(file, key, value) for key, value in content.items()]
    if isinstance(content, list):
        return [_of_record(file, record) for record in content]
    raise InputError(f"{file} must hold a list of names, or ids with names; see docs/own_data.md.")


def _of_pair(file: Path, key: Any, value: Any) -> _Entry:
    if isinstance(value, str) and not value.startswith("#"):
        try:
            return int(key), value
        except ValueError:
            pass
    elif isinstance(key, str) and type(value) is int:
        return value, key
    elif isinstance(key, str):
        return _colour(file, value), key
    raise InputError(
        f"{file} has the entry {shown(key)}: {shown(value)}; it must be an id and a name, a name "
        "and an id, or a name and a colour."
    )


def _of_record(file: Path, record: Any) -> _Entry:
    if isinstance(record, str):
        return None, record
    name = record.get("name") if isinstance(record, dict) else None
    if isinstance(name, str) and name.strip():
        colour = record.get("color", record.get("colour"))
        if colour is not None:
            return _colour(file, colour), name
        if type(record.get("id")) is int:
            return record["id"], name
    raise InputError(
        f"{file} has the entry {shown(record)}; it must be a name, or a record with a name and an "
        "id or a color."
    )


def _colour(file: Path, value: Any) -> Colour:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        value = list(bytes.fromhex(value[1:]))
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(level) is int and 0 <= level <= 255 for level in value)
    ):
        raise InputError(
            f"{file} has the colour {shown(value)}; it must be three numbers from 0 to 255, or "
            "#rrggbb."
        )
    return value[0], value[1], value[2]


def _key(key: Any) -> str:
    return f"the colour {key}" if isinstance(key, tuple) else f"the id {key}"


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not text in UTF-8.") from error
    except OSError as error:
        raise InputError(f"The file {file} cannot be read: {error.strerror}.") from error
