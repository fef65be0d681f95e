"""Checks which of the annotated images can be used: those that exist, can be read completely, and
have the size that their record states. The check precedes encoding, so that one bad image neither
ends a build after hours nor changes the shards' other samples.
"""

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote

from PIL import Image
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import load_recorded
from icl_moe.inputs import check_inside, read_json
from preprocessing.pool import ImageFile, Pool
from preprocessing.workers import ordered_map

CHUNK = 128
"""Images that one worker reads at a time; the results of a chunk are one file."""

Choice = Literal["stop", "skip"]


class HasImage(Protocol):
    """Anything that is based on an image file."""

    @property
    def image(self) -> ImageFile: ...


Item = TypeVar("Item", bound=HasImage)


class UsableImages(Protocol):
    """Chooses the items whose images can be used; see `ImageCheck.keep`."""

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]: ...


class Unchecked:
    """Keeps all items: their images are known to be usable, or are not needed yet."""

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        return list(items)


class ImageCheck:
    """Finds the annotated images and reads each of them once.

    missing_images, bad_images: whether images that are missing, or cannot be used, stop the build
    or are left out and counted.
    notes: a folder for the results, so that a resumed build need not read the images again; an
    image that has changed since is read again. workers: processes that read. seen: the files that
    were looked for.
    """

    def __init__(
        self,
        missing_images: Choice,
        bad_images: Choice,
        notes: Path,
        workers: int = 1,
    ) -> None:
        self._missing_images, self._bad_images = missing_images, bad_images
        self._notes, self._workers = notes, workers
        self.seen: set[Path] = set()
        self._faults: dict[ImageFile, ImageError | None] = {}

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        """The items whose image in `folder` can be used.

        Other images raise an InputError that counts them and names the first. With `skip` they are
        counted in the pool's `skipped` and, if they exist, listed in its `bad_images`.
        """
        items = list(items)
        images = list(dict.fromkeys(item.image for item in items))
        _check_folder(folder)
        present = self._present(images, folder, pool)
        self._read(present)
        bad = {image: fault for image in present if (fault := self._faults[image]) is not None}
        if bad and self._bad_images == "stop":
            others = (
                f" (and {len(bad) - 1} more of {len(images)} annotated images cannot be used)"
                if len(bad) > 1
                else ""
            )
            first = str(next(iter(bad.values()))).rstrip(".")
            raise InputError(f"{first}{others}; replace it, or set bad_images=skip.")
        for image, fault in bad.items():
            pool.skipped[f"images_{fault.reason}"] += 1
            pool.bad_images[image.name] = str(fault)
        return [item for item in items if item.image in present and item.image not in bad]

    def _present(
        self, images: list[ImageFile], folder: Path, pool: Pool
    ) -> dict[ImageFile, os.stat_result]:
        for image in images:
            check_inside(folder, image.path)
        found = {image: _file_status(image.path) for image in images}
        self.seen |= {image.path for image in images}
        missing = sorted(image.name for image, status in found.items() if status is None)
        if missing and self._missing_images == "stop":
            raise InputError(
                f"{len(missing)} of {len(images)} annotated images are missing from {folder}, the "
                f"first is {missing[0]}{_other_spelling(folder, missing[0])}; add them, or set "
                "missing_images=skip."
            )
        pool.skipped["missing_images"] += len(missing)
        return {image: status for image, status in found.items() if status is not None}

    def _read(self, present: dict[ImageFile, os.stat_result]) -> None:
        """Check the images that have no result yet, on all workers."""
        self._notes.mkdir(parents=True, exist_ok=True)
        new = [image for image in present if image not in self._faults]
        chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
        files = [self._notes / f"images-{_digest(chunk, present)}.json" for chunk in chunks]
        todo = [
            (file, chunk) for file, chunk in zip(files, chunks, strict=True) if not file.is_file()
        ]
        with tqdm(
            total=sum(len(chunk) for _, chunk in todo),
            desc="checking images",
            unit="image",
        ) as progress:
            for count in ordered_map(_note_faults, None, todo, self._workers):
                progress.update(count)
        for file, chunk in zip(files, chunks, strict=True):
            faults = {place: ImageError(*fault) for place, *fault in read_json(file)}
            self._faults |= {image: faults.get(place) for place, image in enumerate(chunk)}


class ImageError(InputError):
    """An image cannot be used. reason: the kind of fault, by which images are counted."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)  # The message alone, so that the error survives pickling.
        self.reason = reason


def open_image(file: ImageFile) -> Image.Image:
    """The picture of a record, 8-bit RGB, with the width and height that its annotations assume.

    If an EXIF tag rotates the picture but the record has the size of the stored picture, the
    annotations were made on the stored picture, so that is returned. Raises ImageError if the
    picture cannot be read or its size differs from the record.
    """
    try:
        image = load_recorded(file.path, (file.width, file.height))
    except InputError as error:
        raise ImageError(str(error), _kind_of_fault(file.path)) from error
    if image.size != (file.width, file.height):
        raise ImageError(
            f"The image {file.path} has {image.width} x {image.height} pixels, but its record says "
            f"{file.width} x {file.height}.",
            "of_another_size",
        )
    return image


def _kind_of_fault(path: Path) -> str:
    """The kind of fault of an image that `load_recorded` refuses."""
    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                return "animated"
            try:
                if image.format != "EPS":  # That would start a program.
                    image.load()
            except Exception:  # Pillow's readers raise many kinds.
                return "truncated"
    except Image.DecompressionBombError:
        return "too_large"
    except Exception:
        return "unreadable"
    return "unreadable"


def _note_faults(_: None, work: tuple[Path, list[ImageFile]]) -> int:
    """Read the images of a chunk and record the faulty ones: place in the chunk, sentence, kind."""
    notes, images = work
    faults = []
    for place, image in enumerate(images):
        try:
            open_image(image)
        except ImageError as error:
            faults.append((place, str(error), error.reason))
    write_whole(notes, json.dumps(faults))
    return len(images)


def image_states(paths: Iterable[Path]) -> dict[str, list[int] | None]:
    """Path -> size and time of the last change, in nanoseconds; None if there is no such file."""
    states = {str(path): _file_status(path) for path in paths}
    return {
        path: None if status is None else [status.st_size, status.st_mtime_ns]
        for path, status in states.items()
    }


def _digest(images: list[ImageFile], present: dict[ImageFile, os.stat_result]) -> str:
    """A digest of a chunk's records and the status of their files."""
    states = [(repr(image), present[image].st_size, present[image].st_mtime_ns) for image in images]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _check_folder(folder: Path) -> None:
    status = _status(folder)
    if status is None:
        # pathlib leaves one of a URL's two slashes.
        hint = "; images are read from this machine, not from a URL" * (":/" in str(folder))
        raise InputError(f"The folder of images {folder} does not exist{hint}.")
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(f"{folder} is not a folder; it must be the folder of the images.")


def is_file(path: Path) -> bool:
    """Whether the file exists. Raises InputError if that cannot be determined."""
    return _file_status(path) is not None


def _file_status(path: Path) -> os.stat_result | None:
    status = _status(path)
    return status if status is not None and stat.S_ISREG(status.st_mode) else None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a valid name
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _other_spelling(folder: Path, name: str) -> str:
    """A hint for a message, if a file exists whose name differs only in case, folder, Unicode form
    or quoting.
    """
    for place in dict.fromkeys(((folder / name).parent, folder)):
        try:
            files = sorted(path for path in place.iterdir() if _plain(path.name) == _plain(name))
        except OSError:  # The folder is missing, or its files may be opened but not listed.
            continue
        if like := next(filter(is_file, files), None):
            return f" (there is a file {like})"
    return ""


def _plain(name: str) -> str:
    last = unquote(name).replace("\\", "/").rsplit("/", 1)[-1]
    return unicodedata.normalize("NFC", last).casefold()
