"""Pixels -> codes: encodes every distinct picture of the episodes once, in batches of a fixed
size, on all devices.

Pictures are numbered, those of images before those that tasks draw, and encoded in chunks. A chunk
is one file, written under a temporary name and renamed, so an interrupted build resumes at the
first missing chunk. Under `accelerate launch` each of n processes takes every n-th chunk.

How a library computes depends on the size of a batch, and with it the rounding of a few codes. So
every batch has the same size and is of one tokenizer, filled up if need be. Then a picture's codes
depend neither on its place nor on the other pictures of the batch
(tests/tokenizers/test_batches.py), and may come from a cache of earlier builds instead.

Three parts work at the same time: worker processes load, crop and draw (and look into the cache),
this process encodes on its device, and a thread writes.
"""

import io
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.files import partial_of, write_whole
from icl_moe.images import PixelBox, crop_and_resize
from icl_moe.sequence import SequenceFormat
from icl_moe.tasks import Task
from icl_moe.tasks.task import Picture
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers, Part
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.code_cache import CodeCache, arithmetic, key_of
from preprocessing.image_check import open_image
from preprocessing.pool import ImageFile, PoolRegion
from preprocessing.region_table import mapped
from preprocessing.workers import ordered_map

BATCH = 32
"""Pictures encoded at once. It is part of the shards' definition, since another batch size may
change a code by rounding.
"""
CHUNK = 8 * BATCH


@dataclass(frozen=True, slots=True)
class CropPicture:
    """The input image of a pair, a part of an image file."""

    image: ImageFile
    crop: PixelBox

    def draw(self, size: int) -> np.ndarray:
        """Raises ImageError if the image cannot be read, or its size differs from its record."""
        return np.asarray(crop_and_resize(_open_image(self.image), self.crop, size))


def pictures_of(region: PoolRegion, task: Task, format: SequenceFormat) -> tuple[Picture, ...]:
    """The pictures to encode for a region: its image, then the pictures that its task draws."""
    return CropPicture(region.image, region.crop), *task.pictures(region.target, format)


class CodeStore:
    """Memory-mapped codes of all pictures, which `join_chunks` has put into one file: `store[n]` is
    int64 (codes_per_image,).
    """

    def __init__(self, folder: Path) -> None:
        self._codes = mapped(folder / _ALL_CODES)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._codes[number].astype(np.int64)


def join_chunks(folder: Path, pictures: int) -> None:
    """Copy the chunks of all pictures into the file that `CodeStore` maps.

    A mapped file keeps a descriptor, and a data set of the size of COCO has more chunks than most
    systems let a process open. Raises InputError for a chunk that is damaged, as after a power
    failure.
    """
    target = folder / _ALL_CODES
    partial = partial_of(target)
    with partial.open("wb") as file:
        for number in range(_chunk_count(pictures)):
            rows = min(CHUNK, pictures - number * CHUNK)
            codes = _read_chunk(_chunk_file(folder, number), rows)
            if number == 0:
                header = {
                    "descr": np.lib.format.dtype_to_descr(codes.dtype),
                    "fortran_order": False,
                    "shape": (pictures, codes.shape[1]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(codes.tobytes())
    os.replace(partial, target)


def quantize(
    pictures: Sequence[Picture],
    tokenizers: ImageTokenizers,
    size: int,
    folder: Path,
    workers: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    cache: Path | None = None,
) -> None:
    """Encode this rank's chunks of `pictures` that are not in `folder` yet; see `join_chunks`.

    workers: processes that load, crop and draw. cache: the folder of a `CodeCache`, from which
    codes of earlier builds are taken. Raises InputError for an image that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _open_image.cache_clear()  # An image may have changed since the last build of this process.
    mine = range(rank, _chunk_count(len(pictures)), ranks)
    todo = [n for n in mine if not _chunk_file(folder, n).is_file()]
    batches = [
        range(start, min(start + BATCH, len(pictures)))
        for n in todo
        for start in range(n * CHUNK, min((n + 1) * CHUNK, len(pictures)), BATCH)
    ]
    tokenizers.to(device)
    caches = _open_caches(cache, tokenizers, size, device)
    drawn = ordered_map(_draw_batch, (pictures, size, tokenizers, caches), batches, workers)
    chunk = _Chunk(tokenizers, device)
    with (
        tqdm(
            total=sum(map(len, batches)),
            desc="encoding pictures",
            unit="picture",
            disable=rank != 0,
        ) as progress,
        _Writer(caches, tokenizers.code_type) as writer,
    ):
        for batch, of_batch in zip(batches, drawn, strict=True):
            chunk.take(of_batch)
            if (batch[-1] + 1) % CHUNK == 0 or batch[-1] + 1 == len(pictures):
                chunk.finish()
                writer.write(chunk, _chunk_file(folder, batch[-1] // CHUNK))
                chunk = _Chunk(tokenizers, device)
            progress.update(len(batch))


@dataclass
class _Drawn:
    """A picture that a worker drew: its pixels, or its codes if the cache has them. key: in the
    cache; empty if its part has none.
    """

    part: Part
    is_input: bool
    pixels: np.ndarray | None
    key: bytes = b""
    codes: np.ndarray | None = None


_Caches = dict[Part, CodeCache]


def _open_caches(
    folder: Path | None, tokenizers: ImageTokenizers, size: int, device: torch.device
) -> _Caches:
    """The cache of each tokenizer, except for a mask tokenizer, which is as fast as a look-up."""
    parts: dict[Part, VQGAN | FeaturesTokenizer | None] = {
        "pictures": tokenizers.pictures,
        "features": tokenizers.features,
    }
    about = {"image_size": size, "batch": BATCH, **arithmetic(device)}
    return {
        part: CodeCache(
            folder,
            {
                "tokenizer": tokenizer.fingerprint,
                "precision": getattr(tokenizer, "precision", "fp32"),
                **about,
            },
        )
        for part, tokenizer in parts.items()
        if folder is not None and tokenizer is not None
    }


def _draw_batch(
    context: tuple[Sequence[Picture], int, ImageTokenizers, _Caches], numbers: range
) -> list[_Drawn]:
    pictures, size, tokenizers, caches = context
    batch = []
    for number in numbers:
        picture = pictures[number]
        pixels, is_input = picture.draw(size), isinstance(picture, CropPicture)
        drawn = _Drawn(tokenizers.part_for(pixels, is_input), is_input, pixels)
        if drawn.part in caches:
            drawn.key = key_of(pixels)
            drawn.codes = caches[drawn.part].find(drawn.key)
            drawn.pixels = pixels if drawn.codes is None else None
        batch.append(drawn)
    return batch


class _Chunk:
    """A chunk in progress. Pictures wait until a batch of their tokenizer is full."""

    def __init__(self, tokenizers: ImageTokenizers, device: torch.device) -> None:
        self._tokenizers, self._device = tokenizers, device
        self._waiting: dict[Part, list[_Drawn]] = {}
        self.pictures: list[_Drawn] = []
        self.encoded: list[_Drawn] = []

    def take(self, batch: list[_Drawn]) -> None:
        self.pictures += batch
        for drawn in batch:
            if drawn.codes is None:
                waiting = self._waiting.setdefault(drawn.part, [])
                waiting.append(drawn)
                if len(waiting) == BATCH:
                    self._encode(waiting)

    def finish(self) -> None:
        """Encode what still waits."""
        for waiting in self._waiting.values():
            if waiting:
                self._encode(waiting)

    def _encode(self, waiting: list[_Drawn]) -> None:
        """Encode up to BATCH pictures, as many as BATCH in any case."""
        filled = waiting + waiting[:1] * (BATCH - len(waiting))
        pixels = [drawn.pixels for drawn in filled if drawn.pixels is not None]
        are_inputs = [drawn.is_input for drawn in filled]
        codes_BN = self._tokenizers.encode(pixels, are_inputs, self._device)
        for drawn, codes_N in zip(waiting, codes_BN, strict=False):
            drawn.codes, drawn.pixels = codes_N, None
        self.encoded += waiting
        waiting.clear()


class _Writer:
    """Writes chunks in a thread, each while the next one is encoded."""

    def __init__(self, caches: _Caches, code_type: np.dtype) -> None:
        self._caches, self._code_type = caches, code_type
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)
        self._await_last()

    def write(self, chunk: _Chunk, file: Path) -> None:
        """Write a finished chunk, and into the caches what is new in it. Raises what an earlier
        write raised.
        """
        self._await_last()
        self._last = self._thread.submit(self._write, chunk, file)

    def _await_last(self) -> None:
        if self._last is not None:
            self._last.result()

    def _write(self, chunk: _Chunk, file: Path) -> None:
        for part, cache in self._caches.items():
            new = {
                drawn.key: drawn.codes
                for drawn in chunk.encoded
                if drawn.part == part and drawn.codes is not None
            }
            if new:
                cache.add(new)
        codes = [drawn.codes for drawn in chunk.pictures if drawn.codes is not None]
        _write_chunk(file, np.stack(codes).astype(self._code_type))


_open_image = lru_cache(maxsize=8)(open_image)  # pictures of one image are consecutive


def _chunk_count(pictures: int) -> int:
    return -(-pictures // CHUNK)


_ALL_CODES = "all_codes.npy"


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / f"codes-{number:06d}.npy"


def _read_chunk(path: Path, rows: int) -> np.ndarray:
    try:
        codes: np.ndarray = np.load(path, allow_pickle=False)
        whole = codes.ndim == 2 and len(codes) == rows
    except (EOFError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged; delete it and run the same command again.")
    return codes


def _write_chunk(path: Path, codes: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, codes, allow_pickle=False)
    write_whole(path, content.getvalue())
