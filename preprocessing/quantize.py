"""Pixels -> codes: encodes every distinct picture of the episodes once, in batches of fixed
composition, on all devices.

Pictures are numbered in the order in which episodes first need them and encoded in chunks. A chunk
is one file, written under a temporary name and renamed, so an interrupted build resumes at the
first missing chunk. Under `accelerate launch` each of n processes takes every n-th chunk. The
content of a batch does not depend on the number of processes, so neither do the codes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.files import write_whole
from icl_moe.images import PixelBox, crop_and_resize
from icl_moe.sequence import SequenceFormat
from icl_moe.tasks import Task
from icl_moe.tasks.task import Picture
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
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
    """Memory-mapped codes of all pictures: `store[n]` is int64 (codes_per_image,)."""

    def __init__(self, folder: Path, pictures: int) -> None:
        self._chunks = [mapped(_chunk_file(folder, n)) for n in range(_chunk_count(pictures))]

    def __getitem__(self, number: int) -> np.ndarray:
        chunk, row = divmod(number, CHUNK)
        return self._chunks[chunk][row].astype(np.int64)


def quantize(
    pictures: Sequence[Picture],
    tokenizers: ImageTokenizers,
    size: int,
    folder: Path,
    workers: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Encode this rank's chunks of `pictures` that are not in `folder` yet; `CodeStore` reads them.

    workers: processes that load, crop and draw. Raises InputError for an image that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(rank, _chunk_count(len(pictures)), ranks)
    todo = [n for n in mine if not _chunk_file(folder, n).is_file()]
    batches = [
        range(start, min(start + BATCH, len(pictures)))
        for n in todo
        for start in range(n * CHUNK, min((n + 1) * CHUNK, len(pictures)), BATCH)
    ]
    tokenizers.to(device)
    done: list[np.ndarray] = []
    with tqdm(
        total=sum(map(len, batches)), desc="encoding pictures", unit="picture", disable=rank != 0
    ) as progress:
        for batch, drawn in zip(
            batches, ordered_map(_draw_batch, (pictures, size), batches, workers), strict=True
        ):
            are_inputs = [isinstance(pictures[number], CropPicture) for number in batch]
            done.append(tokenizers.encode(drawn, are_inputs, device))
            progress.update(len(batch))
            if (batch[-1] + 1) % CHUNK == 0 or batch[-1] + 1 == len(pictures):
                _write_chunk(_chunk_file(folder, batch[-1] // CHUNK), np.concatenate(done))
                done = []


def _draw_batch(context: tuple[Sequence[Picture], int], numbers: range) -> list[np.ndarray]:
    pictures, size = context
    return [pictures[number].draw(size) for number in numbers]


_open_image = lru_cache(maxsize=8)(open_image)  # pictures of one image are consecutive


def _chunk_count(pictures: int) -> int:
    return -(-pictures // CHUNK)


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / f"codes-{number:06d}.npy"


def _write_chunk(path: Path, codes: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, codes, allow_pickle=False)
    write_whole(path, content.getvalue())
