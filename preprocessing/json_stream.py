"""Large JSON files read piece by piece, so that memory holds one piece and what a reader keeps of
it.

A file is cut between the entries of its lists, and each piece is decoded as `read_json` decodes the
whole. The places to cut are found by counting quotes and brackets with NumPy, at several hundred
megabytes a second. A file that is not plainly of the expected form, whether it is wrong or only
unusual (such as UTF-16), raises NotPlainError: then the readers of whole files decide, and say what
is wrong.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from icl_moe.inputs import JSONDecoder, json_encoding, with_whole_characters

BLOCK = 1 << 21
"""Bytes read at once, and about the size of a piece."""

_BLANKS = b" \t\n\r"
_KEY = re.compile(rb'[ \t\n\r]*("(?:[^"\\]|\\.)*")[ \t\n\r]*:[ \t\n\r]*', re.DOTALL)
_LONGEST_KEY = 1 << 16

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_MARKS = np.isin(np.arange(256), list(b'"[]{}'))
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class NotPlainError(Exception):
    """A file that cannot be read piece by piece."""


def list_pieces(file: Path) -> Iterator[bytes]:
    """The entries of a file that is one list, as the text of some of them after another, with the
    commas between them; see `decode_piece`.
    """
    with file.open("rb") as stream, _progress(file) as progress:
        text = _Text(stream, progress)
        text.skip(b"[")
        yield from text.entries()
        text.end()


def decode_piece(piece: bytes) -> list[Any]:
    """The entries of a piece. Raises NotPlainError if they are not valid JSON."""
    try:
        text = piece.decode("utf-8")
        entries: list[Any] = JSONDecoder().decode(f"[{text}]")
        return with_whole_characters(entries, text)
    except (ValueError, RecursionError) as error:
        raise NotPlainError from error


def object_members(file: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file that is one object. A list comes in pieces, each with its key;
    an empty one as one empty piece.
    """
    with file.open("rb") as stream, _progress(file) as progress:
        text = _Text(stream, progress)
        text.skip(b"{")
        keys = set()
        while True:
            key = text.key()
            if key in keys:
                raise NotPlainError
            keys.add(key)
            if text.byte() == b"[":
                text.skip(b"[")
                empty = True
                for piece in text.entries():
                    empty = False
                    yield key, decode_piece(piece)
                if empty:
                    yield key, []
            else:
                (value,) = decode_piece(text.value())
                yield key, value
            if text.byte() == b"}":
                break
            text.skip(b",")
        text.skip(b"}")
        text.end()


def _progress(file: Path) -> Any:
    return tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True)


class _Text:
    """The part of a file that is in memory, and the place up to which it was used."""

    def __init__(self, stream: BinaryIO, progress: Any) -> None:
        self._stream, self._progress = stream, progress
        self._data, self._at = b"", 0
        while len(self._data) < 4 and self._fill():
            pass  # The first four bytes tell the encoding.
        encoding = json_encoding(self._data)
        if encoding not in ("utf-8", "utf-8-sig"):
            raise NotPlainError
        self._at = 3 if encoding == "utf-8-sig" else 0

    def _fill(self) -> bool:
        """Read more, at least as much as is waiting, so that a long entry is not searched over and
        over. Returns whether there was more.
        """
        waiting = len(self._data) - self._at
        more = self._stream.read(max(BLOCK, waiting))
        self._data, self._at = self._data[self._at :] + more, 0
        self._progress.update(len(more))
        return bool(more)

    def byte(self) -> bytes:
        """The next byte that is not blank; empty at the end."""
        while True:
            while self._at < len(self._data):
                found = self._data[self._at : self._at + 1]
                if found not in _BLANKS:
                    return found
                self._at += 1
            if not self._fill():
                return b""

    def skip(self, expected: bytes) -> None:
        if self.byte() != expected:
            raise NotPlainError
        self._at += 1

    def end(self) -> None:
        if self.byte():
            raise NotPlainError

    def key(self) -> str:
        """The next key of an object, up to its value."""
        self.byte()
        match = _KEY.match(self._data, self._at)
        while match is None or match.end() == len(self._data):
            if len(self._data) - self._at > _LONGEST_KEY + BLOCK or not self._fill():
                raise NotPlainError
            match = _KEY.match(self._data, self._at)
        self._at = match.end()
        (key,) = decode_piece(match[1])
        return str(key)

    def value(self) -> bytes:
        """The next value of an object, up to the comma or the bracket that follows it."""
        while (found := _cut(self._data, self._at, first=True)) is None:
            if not self._fill():
                raise NotPlainError
        piece = self._data[self._at : found[0]]
        self._at = found[0]
        return piece

    def entries(self) -> Iterator[bytes]:
        """The pieces of a list, whose opening bracket was used, and use its closing one."""
        only = True
        while True:
            found = _cut(self._data, self._at, first=False)
            if found is None:
                if not self._fill():
                    raise NotPlainError
                continue
            place, is_end = found
            piece = self._data[self._at : place]
            if piece.strip(_BLANKS):
                yield piece
            elif not (is_end and only):
                raise NotPlainError  # a comma without an entry
            self._at, only = place, False
            if is_end:
                self.skip(b"]")
                return
            self._at += 1


def _cut(data: bytes, start: int, first: bool) -> tuple[int, bool] | None:
    """Where to cut the content of a list or an object in which data[start:] begins: at the bracket
    that ends it, otherwise (False) at its last comma; or at the first of both.

    A backslash or a bracket out of place may mislead this; then the piece is not valid JSON.
    """
    codes = np.frombuffer(data, dtype=np.uint8, offset=start)
    marks = _MARKS[codes]
    if data.find(b"\\", start) >= 0:
        marks[_escaped(codes)] = False
    places = np.flatnonzero(marks)
    kinds = codes[places]
    outside = np.cumsum(kinds == _QUOTE) % 2 == 0
    depths = np.cumsum(_STEPS[kinds] * outside, dtype=np.int64)
    ends = np.flatnonzero(depths < 0)
    last = int(ends[0]) if len(ends) else len(places)
    if len(ends) and not first:
        return start + int(places[last]), True
    # Commas of this list stand between two marks, the first of which leaves no string or bracket
    # open.
    gaps = np.flatnonzero((depths == 0) & outside)
    gaps = np.concatenate([[-1], gaps[gaps < last]])
    find = data.find if first else data.rfind
    for gap in gaps if first else gaps[::-1]:
        begin = start + (int(places[gap]) + 1 if gap >= 0 else 0)
        end = start + int(places[gap + 1]) if gap + 1 < len(places) else len(data)
        if (comma := find(b",", begin, end)) >= 0:
            return comma, False
    return (start + int(places[last]), True) if len(ends) else None


def _escaped(codes: np.ndarray) -> np.ndarray:
    """The places after an odd number of backslashes."""
    places = np.flatnonzero(codes == _BACKSLASH)
    first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    lengths = np.diff(first, append=len(places))
    after = places[first + lengths - 1][lengths % 2 == 1] + 1
    return after[after < len(codes)]
