"""A folder of downloaded files that all processes of a machine share. Its size is limited: the
least recently used files are removed.

Everything that changes names happens under one lock, which is never held during a download:

    NAME                   a complete file; its time of modification is the time of its last use;
                           locked, and so not removed, by processes that read it by its path
    NAME.SIZE.partial      a file on its way, locked by the process that fetches it; its space is
                           reserved from the start
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from icl_moe.errors import InputError

_OWN_FOLDER = "icl_moe"
"""Everything lies in this subfolder of the folder that the user names: other files there are not
counted or removed.
"""

_PARTIAL = ".partial"


@dataclass(frozen=True)
class FileCache:
    """At most `capacity` bytes of files under `parent`/icl_moe."""

    parent: Path
    capacity: int

    @property
    def folder(self) -> Path:
        return self.parent / _OWN_FOLDER

    def open(self, name: str, size: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor to read the file `name` of `size` bytes; if the file is not in
        the cache, `fetch` writes it to the path that it is given.

        The descriptor stays readable when the file is removed to make room. Raises InputError for
        a file that is larger than the capacity.
        """
        if size > self.capacity:
            raise InputError(
                f"data.cache_gigabytes: the cache {self.folder} may hold {self.capacity} bytes, "
                f"but {Path(name).name} alone takes {size}."
            )
        path = self.folder / name
        while True:
            descriptor = self._open_whole(path, size)
            if descriptor is None:
                descriptor = self._fetch(path, size, fetch)
            if descriptor is not None:
                return descriptor
            # Another process fetches it, or downloads in progress take all the room.
            time.sleep(0.02)

    def keep(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The path of the file that `open` opens. It is not removed before this process ends, so
        the path can be given to what opens files itself.
        """
        path = self.folder / name
        while path not in _kept:
            descriptor = self.open(name, size, fetch)
            with self._locked():
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                still_there = os.fstat(descriptor).st_nlink > 0
            if still_there:
                _kept[path] = descriptor
            else:  # It was removed between opening and locking.
                os.close(descriptor)
        return path

    def _open_whole(self, path: Path, size: int) -> int | None:
        """A descriptor of a complete file, after recording its use; None if there is no such
        file.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == size:
            os.utime(descriptor)
            return descriptor
        # The machine stopped before the content was on the disk.
        os.close(descriptor)
        with self._locked(), contextlib.suppress(FileNotFoundError):
            if path.stat().st_size != size:
                path.unlink()
        return None

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], None]) -> int | None:
        """Download the file; None if that cannot begin now."""
        partial = path.with_name(f"{path.name}.{size}{_PARTIAL}")
        claim = self._claim(path, partial, size)
        if claim is None:
            return None
        try:
            fetch(partial)
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            with self._locked():
                os.replace(partial, path)
            return descriptor
        except BaseException:
            with self._locked():
                partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(claim)

    def _claim(self, path: Path, partial: Path, size: int) -> int | None:
        """Make room, create `partial` and lock it; the descriptor that holds the lock, or None."""
        with self._locked():
            if path.exists() or _is_in_use(partial) or not self._make_room(size, partial):
                return None
            partial.parent.mkdir(parents=True, exist_ok=True)
            claim = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(claim, fcntl.LOCK_EX)
            return claim

    def _make_room(self, size: int, but: Path) -> bool:
        """Remove files, the least recently used first, until `size` more bytes fit; returns whether
        they do. `but` is the file to be downloaded. Raises InputError if they can never fit, since
        this process keeps the rest of the room.
        """
        files = sorted(
            (_last_use(path), path, _room(path))
            for path in self.folder.rglob("*")
            if path.is_file() and path not in (but, self._lock_file)
        )
        kept = sum(room for _, path, room in files if path in _kept)
        if kept + size > self.capacity:
            raise InputError(
                f"data.cache_gigabytes: the cache {self.folder} may hold {self.capacity} bytes, of "
                f"which {kept} are in use, but {but.name.removesuffix(f'.{size}{_PARTIAL}')} takes "
                f"{size} more."
            )
        excess = sum(room for _, _, room in files) + size - self.capacity
        for _, path, room in files:
            if excess <= 0:
                break
            if not _is_in_use(path):
                path.unlink(missing_ok=True)
                excess -= room
        return excess <= 0

    @property
    def _lock_file(self) -> Path:
        return self.folder / "lock"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(
                f"data.cache: the folder {self.folder} cannot be written to ({error.strerror})."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def default_parent() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


_kept: dict[Path, int] = {}
"""The files that this process keeps in their caches, and the descriptors that hold their locks."""


def _is_in_use(path: Path) -> bool:
    """Whether a process holds a lock on a file: it downloads or keeps it. Locks end with their
    process, however it ends.
    """
    if path in _kept:
        return True
    try:
        # Where locks of flock are made from those of fcntl, as on NFS, an exclusive one needs a
        # file that is open for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # A file system without locks.
    finally:
        os.close(descriptor)
    return False


def _last_use(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _room(path: Path) -> int:
    """The bytes that a file takes, or will take once it is complete."""
    if path.suffix == _PARTIAL:
        return int(path.name.split(".")[-2])
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
