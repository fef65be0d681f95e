"""The files and folders that commands write: checked before the work begins, so that no work is
lost because its result cannot be written, and written as a whole.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from icl_moe.errors import InputError
from icl_moe.files import partial_of, write_whole

# Two letters at least: pathlib leaves one of a URL's two slashes.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


_LONGEST_NAME = 255
"""Bytes, on nearly all file systems."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder to write into, which need not exist yet, with ~ expanded.

    Nothing is created. Raises InputError for a URL, for an empty name, and if the file system does
    not allow a file there.
    """
    folder = _local(path)
    _check_place(folder, folder)
    return folder


def output_file(
    path: str | os.PathLike[str], suffixes: Sequence[str], inputs: Iterable[str | Path] = ()
) -> Path:
    """The file to write, whose folder need not exist yet, with ~ expanded.

    A link is resolved to its target. A special file, such as a device, may have any name. Raises
    InputError as `output_folder` does, and for a folder, for a name that ends in none of
    `suffixes`, and for one of the command's `inputs`.
    """
    file = _local(path)
    with writing(file):
        if file.is_dir():
            raise InputError(
                f"{file} is a folder; it must be a file, such as {file / 'name'}{suffixes[0]}."
            )
        if file.exists() and not file.is_file():
            if not os.access(file, os.W_OK):
                raise InputError(f"{file} may not be written.")
            return file
        if file.suffix.lower() not in suffixes:
            *most, last = suffixes
            endings = f"{', '.join(most)} or {last}" if most else last
            raise InputError(f"{file} must end in {endings}.")
        target = Path(os.path.realpath(file))
        if len(os.fsencode(partial_of(target).name)) > _LONGEST_NAME:
            raise InputError(f"{file}: the name of the file is too long; choose a shorter one.")
        if any(os.path.realpath(path) == str(target) for path in inputs):
            raise InputError(
                f"{file} is also an input and would be overwritten; choose another name."
            )
    _check_place(file, target.parent)
    return file


def write_output(path: Path, content: bytes | str) -> None:
    """Write a file that `output_file` approved, completely or not at all, and make its folder."""
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system refuses while `path`, a file or a folder, is written into an
    InputError that names it. Errors of other files remain what they are, except for a full disk.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else os.fspath(path)
        is_there = Path(where).is_relative_to(path)
        if isinstance(error, BrokenPipeError) or not (is_there or error.errno in _NO_ROOM):
            raise
        raise InputError(f"Writing {where} failed: {error.strerror or error}.") from error
    except SafetensorError as error:
        # The number of the system's error is only in the text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise InputError(f"Writing {path} failed: {os.strerror(int(number[1]))}.") from error


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if _URL.match(text):
        raise InputError(f"{text} is a URL; it must be a path on this machine.")
    if not text:
        raise InputError("The name of the output is empty; it must be a path.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text} names the home of a user who is not known.") from error


def _check_place(path: Path, folder: Path) -> None:
    """Raise InputError, naming `path`, if no file can be made in `folder` or, if it is missing, in
    the nearest existing folder above it.
    """
    try:
        while not folder.exists():
            if folder.is_symlink():
                raise InputError(f"{path} cannot be written: {folder} is a broken link.")
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: {folder} is not a folder.")
        # The most reliable test, which covers access rights, quotas and read-only file systems.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from error
