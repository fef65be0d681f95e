"""The places of shards: a folder of this machine, or an fsspec URL, whose files go through a local
cache of limited size.

A folder is never listed, because its manifest names every file, with size and sha256.
"""

import hashlib
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from icl_moe.data.cache import FileCache, default_parent
from icl_moe.errors import InputError
from icl_moe.ranges import Natural
from icl_moe.recipe import DataSettings

MANIFEST_FILE = "manifest.json"

_WAITS = (0.5, 1.0, 2.0)
"""Seconds before each retry of a failed transfer."""

_SILENCE = 60.0
"""Seconds without data after which a server counts as unreachable."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileInfo:
    """One file of a shard folder: its name (a path with one / at most), its size in bytes and its
    sha256 (hex).
    """

    file: str
    bytes: Natural
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> "FileInfo":
        with (folder / name).open("rb") as file:
            return cls(
                name,
                (folder / name).stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            )


class ShardFolder(Protocol):
    """A shard folder at some place. name: the folder's name in messages. manifest_json: the content
    of its manifest. open_files: how many files to keep open at a time.
    """

    name: str
    manifest_json: bytes
    open_files: int

    def check(self, info: FileInfo) -> None:
        """Raise InputError if the file is missing or has another size, as far as that is known
        without reading it.
        """

    def open(self, info: FileInfo) -> int:
        """A descriptor to read a file of the manifest. Raises InputError if it is missing or has
        another size.
        """

    def fetch(self, name: str, files: tuple[FileInfo, ...]) -> Path:
        """The folder `name` within this one, holding `files`, on this machine."""


def open_folder(location: str | Path, cache: FileCache | None = None) -> ShardFolder:
    """The shard folder at a path or URL. cache: where a URL's files are kept, by default in the
    user's cache folder.

    Raises InputError where there is no manifest, where a URL cannot be read, and for an empty name,
    which would stand for the folder that the command runs in.
    """
    if not str(location):
        raise InputError("The name of the shard folder is empty; it must be a path or a URL.")
    if "://" in str(location):
        return RemoteFolder(str(location), cache or make_cache())
    return LocalFolder(Path(location))


def make_cache(
    parent: str | None = DataSettings.cache, gigabytes: float = DataSettings.cache_gigabytes
) -> FileCache:
    """The cache of the settings data.cache and data.cache_gigabytes."""
    return FileCache(
        Path(parent).expanduser() if parent else default_parent(), int(gigabytes * 1e9)
    )


class LocalFolder:
    """A folder of this machine."""

    open_files = 64

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path))  # Path.resolve fails for a link to itself.
        self.name = str(self._path)
        try:
            self.manifest_json = (self._path / MANIFEST_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_manifest(self.name) from error
        except OSError as error:
            raise InputError(
                f"{self._path / MANIFEST_FILE} cannot be read ({error.strerror})."
            ) from error

    def check(self, info: FileInfo) -> None:
        path = self._path / info.file
        try:
            is_there = path.is_file()
        except OSError as error:  # for example, the name is too long
            raise InputError(f"The file {path} cannot be read ({error.strerror}).") from error
        if not is_there:
            raise InputError(f"The file {path} is missing.")
        check_size(str(path), path.stat().st_size, info)

    def open(self, info: FileInfo) -> int:
        path = self._path / info.file
        self.check(info)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"The file {path} cannot be read ({error.strerror}).") from error

    def fetch(self, name: str, files: tuple[FileInfo, ...]) -> Path:
        return self._path / name


class RemoteFolder:
    """A folder at a URL.

    Downloads are checked against the manifest and kept under the hash of the manifest, so a folder
    that changes at its source gets a new folder in the cache.
    """

    open_files = 1  # A removed file takes up space as long as it is open.

    def __init__(self, url: str, cache: FileCache) -> None:
        self.name = url.rstrip("/")
        self._cache = cache
        try:
            self.manifest_json: bytes = _with_retries(
                self._url(MANIFEST_FILE), lambda filesystem, path: filesystem.cat_file(path)
            )
        except _MissingError as error:
            raise _no_manifest(self.name) from error
        self._subfolder = hashlib.sha256(self.manifest_json).hexdigest()[:16]

    def check(self, info: FileInfo) -> None:
        """Does nothing: files are checked when they are downloaded."""

    def open(self, info: FileInfo) -> int:
        return self._cache.open(*self._entry(info))

    def fetch(self, name: str, files: tuple[FileInfo, ...]) -> Path:
        for info in files:
            self._cache.keep(*self._entry(info))
        return self._cache.folder / self._subfolder / name

    def _entry(self, info: FileInfo) -> tuple[str, int, Callable[[Path], None]]:
        """A file's name in the cache, its size, and what downloads it."""
        return f"{self._subfolder}/{info.file}", info.bytes, partial(self._download, info)

    def _url(self, file: str) -> str:
        return f"{self.name}/{file}"

    def _download(self, info: FileInfo, path: Path) -> None:
        url = self._url(info.file)

        def transfer(filesystem: Any, source: str) -> None:
            filesystem.get_file(source, str(path))
            check_size(url, path.stat().st_size, info)
            if FileInfo.of(path.parent, path.name).sha256 != info.sha256:
                raise InputError(
                    f"The file {url} is corrupt: its sha256 differs from the manifest."
                )

        _with_retries(url, transfer)


def check_size(name: str, size: int, info: FileInfo) -> None:
    """Raise InputError if the size of a file differs from the manifest."""
    if size != info.bytes:
        kind = "truncated" if size < info.bytes else "too long"
        raise InputError(
            f"The file {name} is {kind}: it has {size} bytes, the manifest says {info.bytes}."
        )


class _MissingError(InputError):
    """The server reports that the file does not exist."""


def _with_retries(url: str, transfer: Callable[[Any, str], T]) -> T:
    """The result of `transfer(filesystem, path)`, which is tried again after a failure that may be
    temporary. Raises InputError, naming the URL.
    """
    filesystem, path = _filesystem(url)
    for wait in (*_WAITS, None):
        try:
            return transfer(filesystem, path)
        except FileNotFoundError as error:
            raise _MissingError(f"{url} does not exist.") from error
        except PermissionError as error:
            raise InputError(
                f"{url} may not be read ({_reason(error)}); check the credentials."
            ) from error
        except Exception as error:  # The client of every protocol has its own exceptions.
            if wait is None or _is_refusal(error):
                raise (
                    error
                    if isinstance(error, InputError)
                    else InputError(f"{url} cannot be read ({_reason(error)}).")
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and its path there. There is one per process: fsspec makes
    another after a fork.
    """
    protocol = url.split("://")[0].split("::")[0]
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol))
    except ImportError as error:
        raise InputError(
            f"{url} needs a package for {protocol}:// that is not installed: pip install "
            "'icl-moe[remote]'."
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(
            f"{url} cannot be read ({_reason(error)}); s3://, gs://, http:// and https:// are "
            "known."
        ) from error


def _options(protocol: str) -> dict[str, Any]:
    """Options that must differ from the defaults of the clients."""
    if protocol in ("http", "https"):
        # By default a whole transfer may take five minutes, however large it is.
        timeout = importlib.import_module("aiohttp").ClientTimeout(
            total=None, sock_connect=_SILENCE, sock_read=_SILENCE
        )
        return {"client_kwargs": {"timeout": timeout}}
    if protocol in ("s3", "s3a"):
        # By default ten parts of 50 MB are in memory at a time, and each of s3fs's five tries is
        # five of botocore's.
        return {
            "max_concurrency": 4,
            "default_block_size": 4 << 20,
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }
    return {}


def _is_refusal(error: Exception) -> bool:
    """Whether an HTTP server has rejected the request as wrong, so that a retry would not help."""
    status = getattr(error, "status", 0)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _no_manifest(name: str) -> InputError:
    return InputError(
        f"there are no shards in {name}, which has no {MANIFEST_FILE}; `icl-moe shards build` "
        "makes them."
    )
