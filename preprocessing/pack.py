"""Episodes -> webdataset shards. A shard is a pure function of its number, so any number of
processes writes the same bytes.
"""

import io
import json
import math
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from icl_moe.data.location import FileInfo
from icl_moe.data.shards import INDEX_TYPE, ShardInfo, index_file, sample_checksum, sample_key
from icl_moe.files import write_whole
from icl_moe.sequence import Episode, SequenceCodec, TokenSequence
from icl_moe.tasks import Task
from preprocessing.pool import PoolRegion
from preprocessing.quantize import CodeStore


@dataclass(frozen=True)
class TaskEpisodes:
    """The episodes of one task as region numbers (samples, examples + 1), and each region's
    pictures.

    pictures: int64 (regions, most pictures of a region), the numbers in the code store of the image
    and of the pictures that the task draws, padded with -1. notes: what KEY.json says besides about
    each episode; empty for nothing.
    """

    task: Task
    regions: Sequence[PoolRegion]
    episodes: np.ndarray
    pictures: np.ndarray
    notes: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Packer:
    """What every shard is made from. Shards are written to `folder`, and a JSON file with each
    shard's index rows to `notes`.
    """

    folder: Path
    notes: Path
    codec: SequenceCodec
    codes: CodeStore
    tasks: dict[str, TaskEpisodes]
    image_size: int


@dataclass(frozen=True)
class ShardRange:
    """The samples of a shard: those of `task` from `start` up to, not including, `stop`."""

    task: str
    number: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.task}-{self.number:06d}.tar"


def shard_ranges(task: str, samples: int, shard_size: int) -> list[ShardRange]:
    return [
        ShardRange(task, n, start, min(start + shard_size, samples))
        for n, start in enumerate(range(0, samples, shard_size))
    ]


def pack_shard(packer: Packer, shard: ShardRange) -> int:
    """Write one shard and its notes unless both exist, and return its number of samples."""
    target, notes = packer.folder / shard.file, packer.notes / f"{shard.file}.json"
    if target.is_file() and notes.is_file():
        return shard.stop - shard.start
    partial = packer.folder / f"{shard.file}.partial"
    rows, classes = [], Counter[str]()
    with partial.open("wb") as file:
        archive = _Archive(file)
        for index in range(shard.start, shard.stop):
            category, sequence, meta = _sample(packer, shard.task, index)
            tokens_L = sequence.tokens_L.astype(packer.codec.format.vocabulary.token_dtype)
            raw_tokens, raw_json = _npy_bytes(tokens_L), _json_bytes(meta)
            key = sample_key(shard.task, index)
            of_json = archive.add(f"{key}.json", raw_json)
            of_tokens = archive.add(f"{key}.tokens.npy", raw_tokens)
            checksum = sample_checksum(raw_tokens, raw_json)
            lengths = role_lengths(sequence)
            rows.append([*of_tokens, *of_json, *lengths, checksum, *query_lengths(sequence)])
            classes[category] += 1
        archive.close()
    written = FileInfo.of(packer.folder, partial.name)
    samples = shard.stop - shard.start
    info = ShardInfo(shard.file, written.bytes, written.sha256, shard.task, samples)
    # The notes come first, so that a shard that appears is finished in any case.
    write_whole(notes, _json_bytes({"shard": asdict(info), "classes": classes, "rows": rows}))
    os.replace(partial, target)
    return samples


def collect(
    packer: Packer, ranges: Sequence[ShardRange]
) -> tuple[tuple[ShardInfo, ...], dict[str, dict[str, int]]]:
    """Write the index of all shards from their notes, and return the manifest's entries about them:
    the shards, and the classes of each task.
    """
    shards: list[ShardInfo] = []
    classes: dict[str, Counter[str]] = {task: Counter() for task in packer.tasks}
    rows: dict[str, list[np.ndarray]] = {task: [] for task in packer.tasks}
    for number, shard in enumerate(ranges):
        notes = json.loads((packer.notes / f"{shard.file}.json").read_bytes())
        shards.append(ShardInfo(**notes["shard"]))
        classes[shard.task].update(notes["classes"])
        rows[shard.task].append(
            np.array([(number, *row) for row in notes["rows"]], dtype=INDEX_TYPE)
        )
    for task, parts in rows.items():
        write_whole(packer.folder / index_file(task), _npy_bytes(np.concatenate(parts)))
    return tuple(shards), {task: dict(sorted(counts.items())) for task, counts in classes.items()}


def _sample(packer: Packer, task: str, index: int) -> tuple[str, TokenSequence, dict[str, Any]]:
    """Class, sequence and KEY.json of one episode; docs/shards.md describes KEY.json."""
    of_task = packer.tasks[task]
    numbers = of_task.episodes[index]
    regions = [of_task.regions[number] for number in numbers]
    pairs = []
    for region, pictures in zip(regions, of_task.pictures[numbers].tolist(), strict=True):
        image, *drawn = (packer.codes[picture] for picture in pictures if picture >= 0)
        pairs.append(
            of_task.task.pair(packer.codec.format, region.category, image, region.target, drawn)
        )
    category = regions[-1].category
    sequence = packer.codec.encode(Episode(of_task.task, category, tuple(pairs)))
    meta = {
        "task": task,
        "class": category,
        "spans": [[span.start, span.length, span.attributes, span.role] for span in sequence.spans],
        "sources": [
            {
                "image": region.image.name,
                "size": [region.image.width, region.image.height],
                "annotations": region.annotations,
                "crop": region.crop,
                **({"provenance": region.provenance} if region.provenance else {}),
            }
            for region in regions
        ],
        "scale": [round(region.scale, 6) for region in regions],
        **({"style": regions[-1].style} if regions[-1].style else {}),
        **({"group": regions[-1].group} if regions[-1].group else {}),
        **of_task.task.describe([region.target for region in regions], packer.image_size),
        **(of_task.notes[index] if of_task.notes else {}),
    }
    return category, sequence, meta


def role_lengths(sequence: TokenSequence) -> tuple[int, int, int]:
    """Number of tokens without padding, of role input, and of role output."""
    by_role = {"padding": 0, "input": 0, "output": 0}
    for span in sequence.spans:
        if span.role in by_role:
            by_role[span.role] += span.length
    return len(sequence) - by_role["padding"], by_role["input"], by_role["output"]


def query_lengths(sequence: TokenSequence) -> tuple[int, int]:
    """Number of the query's tokens of role input, and of role output."""
    by_role = {"input": 0, "output": 0}
    for span in sequence.query_spans:
        if span.role in by_role:
            by_role[span.role] += span.length
    return by_role["input"], by_role["output"]


class _Archive:
    """Writes a tar file of the bytes that webdataset's TarWriter writes with tarfile, which take
    ten times as long, and tells where the content of each file is.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def add(self, name: str, content: bytes) -> tuple[int, int]:
        """The offset of the content in the archive, and its size."""
        header = _tar_header(name.encode("ascii"), len(content))
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        self._file.write(header + content + padding)
        offset = self._size + len(header)
        self._size = offset + len(content) + len(padding)
        return offset, len(content)

    def close(self) -> None:
        """End the archive, whose size is a multiple of a tape's record."""
        end = self._size + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(end - self._size + -end % tarfile.RECORDSIZE))


def _tar_header(name: bytes, size: int) -> bytes:
    """The header of a file of mode 444 that belongs to nobody, in the format ustar (POSIX.1): its
    checksum is the sum of its bytes, counted with blanks instead of the checksum.
    """
    assert len(name) <= tarfile.LENGTH_NAME and size < 8**11, "keys are short, and samples small"
    start = name.ljust(tarfile.LENGTH_NAME, b"\0") + _OWNER + b"%011o\0" % size + _TIME
    checksum = sum(start) + 8 * ord(" ") + _SUM_OF_REST
    return start + b"%06o\0 " % checksum + _REST


_OWNER = b"0000444\x00" + 2 * b"0000000\x00"
_TIME = b"00000000000\x00"
_REST = (b"0" + bytes(tarfile.LENGTH_LINK) + tarfile.POSIX_MAGIC).ljust(
    tarfile.BLOCKSIZE - 156, b"\0"
)
_SUM_OF_REST = sum(_REST)


def _npy_bytes(array: np.ndarray) -> bytes:
    return _npy_header(array.dtype, array.shape) + array.tobytes()


@lru_cache
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What precedes the values in NumPy's file of an array that is contiguous."""
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype), allow_pickle=False)
    return file.getvalue()[: file.tell() - math.prod(shape) * dtype.itemsize]


def _json_bytes(content: Any) -> bytes:
    return _ENCODER.encode(content).encode()


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
