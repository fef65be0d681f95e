"""The journal of a labelling run: what is finished, so that a killed run goes on where it was."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks; there two runs with one output are not noticed.
    fcntl = None  # type: ignore[assignment]


class Journal:
    """A file of lines beside the output: the settings, then the entries of one batch of images in
    each line. A line that was cut off by the end of a process does not count.

    Raises InputError if a batch was finished with other settings, if the file is no journal, or if
    another process is writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._line_of: dict[str, int] = {}
        """Where in the file the line with a file's entry begins."""
        try:
            self._lock()
            self._open(settings)
        except InputError:
            self.close()  # The lock, too, ends with it.
            raise

    def __contains__(self, file: str) -> bool:
        """Whether the journal has the entry of a file."""
        return file in self._line_of

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Append the entries of the next batch, completely or not at all."""
        begin = self._size
        self._append(entries)
        self._note(entries, begin)

    def entries(self, files: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The entries of files, in their order, read one batch at a time."""
        begin, batch = -1, dict[str, dict[str, Any]]()
        for file in files:
            if self._line_of[file] != begin:
                begin = self._line_of[file]
                self._file.seek(begin)
                batch = {entry["file"]: entry for entry in json.loads(self._file.readline())}
            yield batch[file]

    def remove(self) -> None:
        """Delete the file, whose content has become the output."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        # Closing tries again to write what the system has just refused, which was reported.
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Read what the file holds, and begin it if it is new."""
        size, others = 0, []
        for line in self._lines():
            if size == 0:
                others = self._differences(line, settings)
            else:
                self._note(json.loads(line), size)
            size += len(line)
        if not size:
            self._check_beginning(settings)
        if others and self._line_of:
            raise InputError(
                f"{self.path} was begun with other settings (different: {', '.join(others)}); "
                "repeat the command as it was, or delete the file to begin anew."
            )
        self._size = size if self._line_of else 0
        self._file.truncate(self._size)
        if not self._line_of:
            self._append(dict(settings))

    def _append(self, content: Any) -> None:
        line = _line(content)
        self._file.write(line)
        self._file.flush()
        self._size += len(line)

    def _note(self, entries: list[dict[str, Any]], begin: int) -> None:
        self._line_of |= {entry["file"]: begin for entry in entries}

    def _lines(self) -> Iterator[bytes]:
        """The whole lines."""
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            yield line

    def _differences(self, line: bytes, settings: Mapping[str, Any]) -> list[str]:
        """The names of the settings that are others in a journal's first line."""
        try:
            begun = json.loads(line)
        except ValueError:
            begun = None
        if not isinstance(begun, dict):
            raise self._foreign()
        return [name for name in settings if begun.get(name) != settings[name]]

    def _check_beginning(self, settings: Mapping[str, Any]) -> None:
        """Raise InputError if the file without a whole line is not the beginning of a journal."""
        self._file.seek(0)
        if not _line(dict(settings)).startswith(self._file.read()):
            raise self._foreign()

    def _foreign(self) -> InputError:
        return InputError(
            f"{self.path} is no journal of a labelling run; move it away, or choose another --out."
        )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another process is writing {self.path}; wait until it has ended, or choose "
                "another --out."
            ) from error
        except OSError:
            return  # A file system without locks.
        if not self.path.exists() or not os.path.samestat(
            os.fstat(self._file.fileno()), self.path.stat()
        ):
            raise InputError(
                f"Another process has just finished {self.path}; repeat the command to label anew."
            )


def journal_of(out: Path) -> Path:
    """Where the journal of a run with this output is."""
    return out.with_name(f"{out.name}.journal")


def _line(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
