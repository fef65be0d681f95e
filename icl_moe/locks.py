"""Folders into which only one process at a time writes."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from icl_moe.errors import InputError
from icl_moe.messages import is_main, say

LOCK_FILE = ".lock"
"""A file in a folder while a process writes there; it names that process."""

_PATIENCE = 5.0
"""How many seconds to wait for a process that is about to end and free its folder."""


@contextlib.contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Within this context only this process writes into `folder`, which is created if it is
    missing.

    The lock ends with the process, in whichever way it ends, and also works between machines if
    their file system has locks. key: the setting that names the folder, for messages. Raises
    InputError if another process has the lock, and if the folder cannot be written.
    """
    is_new = not folder.exists()
    path = folder / LOCK_FILE
    file = _wait_for_lock(path, key)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if is_new:
                folder.rmdir()  # It stays if anything was written into it.
        os.close(file)


def locked_by_first(out: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of --out; if several processes share the work, the first one takes it."""
    return locked(out, "--out") if is_main() else contextlib.nullcontext()


def _wait_for_lock(path: Path, key: str) -> int:
    """The lock file, open and locked."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"{key}: {path.parent} cannot be written ({error.strerror})."
            ) from error
        if _try_lock(file, path):
            return file
        holder = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        if time.monotonic() > deadline:
            raise InputError(
                f"{key}: {holder or 'another process'} is writing to {path.parent}; wait until it "
                "has ended, or choose another folder."
            )
        time.sleep(0.1)


def _try_lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file), path.stat()):
            return False
    except (BlockingIOError, FileNotFoundError):
        return False  # Another process has the lock, or has just removed its file.
    except OSError as error:
        say(
            f"warning: {path.parent} cannot be locked ({error.strerror}); make sure that no other "
            "process writes there."
        )
    with contextlib.suppress(OSError):  # On a full disk the name is missing; the lock works.
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return True
