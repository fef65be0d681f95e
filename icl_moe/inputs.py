"""Reading files that users provide: JSON in the forms that occur, and clear errors for the rest."""

import contextlib
import json
import os
import re
from collections import Counter
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from icl_moe.errors import InputError, shown

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def shipped_folders(where: str, file: str) -> dict[str, Path]:
    """Name -> folder, for the folders in `where` of this package that hold a `file`.

    Such a name takes precedence over a folder of the user, since `icl-moe demo` makes a folder
    demo, which must not hide the shipped demo. Write ./demo for the folder.
    """
    root = Path(str(resources.files("icl_moe"))) / where
    folders = sorted(path for path in root.glob("*") if (path / file).is_file())
    return {folder.name: folder for folder in folders}


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8 (or UTF-16 or 32), with or without a byte order mark.

    Half a character in its texts, such as "\\ud83d" alone, becomes U+FFFD (see `whole_characters`).
    Raises InputError if the file is missing, cannot be read or is malformed.
    """
    check_is_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"The file {path} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise InputError(f"The file {path} is empty; it must be JSON.")
    if kind := other_kind(content):
        raise InputError(f"{path} is {kind}.")
    try:
        text = content.decode(json_encoding(content))
        del content  # Half a gigabyte, for COCO.
        return with_whole_characters(json.loads(text, cls=JSONDecoder), text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid JSON: it is not text in UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise json_error(path, error) from error


_WEB_PAGE = (
    "a web page: its address leads to a page about the file; download the file itself, not the page"
)
_KINDS = {  # by how such files begin, in lower case
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"pk\x03\x04": "a ZIP archive; unpack it first",
}

_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
"""The fifth to twelfth byte of the photographs of phones."""


def other_kind(start: bytes) -> str | None:
    """What a file that begins with `start` is, where it is none of data but what people often have
    in its place; as the end of a sentence, with what to do.
    """
    if start[4:12] in _HEIC:
        return "in the format HEIC, which cannot be read here; convert it to JPEG or PNG first"
    head = start[:64].lstrip().lower()
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)


def other_kind_of(path: Path) -> str | None:
    """`other_kind` of a file; None also where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return other_kind(file.read(64))
    return None


def check_is_file(path: Path) -> None:
    """Raise InputError if `path` is not a file or cannot be accessed."""
    try:
        if path.is_file():
            return
        exists = path.exists()
    except OSError as error:
        raise InputError(f"The file {path} cannot be read: {error.strerror}.") from error
    if exists:
        raise InputError(f"{path} is not a file; it must be one, not a folder or a device.")
    raise InputError(f"The file {path} does not exist.")


def is_inside(name: str) -> bool:
    """Whether a file name is a path that stays within its folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
    )


def check_inside(folder: Path, file: Path) -> None:
    """Raise InputError if a link leads from a file in a folder to another place, to which the data
    set must not give access.
    """
    try:
        inside = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # not a valid name, so there is no such file
        return
    if not inside:
        raise InputError(
            f"{file} is a link that leads out of the folder {folder}; put the file itself there."
        )


class JSONDecoder(json.JSONDecoder):
    """Decodes as `read_json` does: a key that occurs twice in a record is an error, whereas plain
    decoders silently keep the last value.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_record)


class _KeyTwiceError(ValueError):
    """A key occurs twice in a record."""


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _KeyTwiceError(f"the key {shown(twice)} occurs twice in one record")
    return record


def json_encoding(start: bytes) -> str:
    """The encoding of a JSON file that begins with the four bytes `start`."""
    return json.detect_encoding(start[:4])


def json_error(path: Path | str, error: Exception) -> InputError:
    """The message to the user for a ValueError or RecursionError of the JSON decoder. path: the
    file, or a line of it.
    """
    if isinstance(error, json.JSONDecodeError):
        return InputError(
            f"{path}, line {error.lineno}, column {error.colno} is not valid JSON: {error.msg}."
        )
    if isinstance(error, RecursionError):
        return InputError(f"{path} cannot be read: its JSON is nested too deeply.")
    if isinstance(error, _KeyTwiceError):
        return InputError(f"{path} contradicts itself: {error}.")
    return InputError(f"{path} cannot be read: its JSON has a number with too many digits.")


def with_whole_characters(content: Any, text: str, start: int = 0, end: int | None = None) -> Any:
    """`content`, which was decoded from the JSON `text[start:end]`, with `whole_characters` in its
    texts.
    """
    found = _SURROGATE_ESCAPE.search(text, start, len(text) if end is None else end)
    return _whole(content) if found else content


def whole_characters(text: str) -> str:
    """`text` with U+FFFD instead of each lone surrogate.

    JSON can contain lone surrogates, if a program cut a text within an emoji. UTF-8 cannot, so
    neither files nor tokenizers accept them.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole(content: Any) -> Any:
    if isinstance(content, str):
        return whole_characters(content)
    if isinstance(content, list):
        return [_whole(item) for item in content]
    if isinstance(content, dict):
        return {key: _whole(value) for key, value in content.items()}
    return content
