"""Writing files as a whole: under a temporary name, then renamed, so that no reader ever sees a
part of a file.
"""

import contextlib
import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: bytes | str, partial: Path | None = None) -> None:
    """Write `path` (text as UTF-8), replacing an existing file, or leave that unchanged if it
    fails.

    partial: where the content stands until it is whole, by default `partial_of(path)`. Processes
    that may write the same file at the same time need a place each.
    """
    partial = partial or partial_of(path)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # A full disk needs the space.
        raise


def partial_of(path: Path) -> Path:
    """Where the content of `path` stands until it is whole."""
    return path.with_name(f"{path.name}.partial")


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder and of those in it into `target`, replacing what is there.

    They get the usual mode of new files: the copy of a read-only file is not read-only.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, copy)


def give_usual_mode(path: Path) -> None:
    """Give a file the mode that a new file in its folder gets (by the umask, or the folder's access
    control list): safetensors leaves files that only their owner may read.
    """
    probe = path.with_name(f"{path.name}.mode")
    probe.unlink(missing_ok=True)
    probe.touch()
    try:
        shutil.copymode(probe, path)
    finally:
        probe.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk.

    Raises OSError if that fails: a disk, a quota or a network may accept a file and report only
    now that there is no room for it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_readable(path: Path) -> None:
    """Raise OSError if a file, or any file in a folder, is missing or may not be read."""
    for file in path.iterdir() if path.is_dir() else [path]:
        if not file.is_dir():
            with file.open("rb"):
                pass
