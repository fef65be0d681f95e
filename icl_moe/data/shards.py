"""Reading a shard folder: manifest, index, and access to any sample by its number.

manifest.json            what the shards hold and how they were made; `Manifest`
TASK.index.npy           where each sample of a task lies, its lengths and its checksum; `IndexRow`
image_tokenizer/         the VQGAN that made the codes, if there is one; also text_tokenizer/,
                         mask_tokenizer/ if one encoded the masks, and features_tokenizer/ if one
                         read the input images
TASK-000000.tar ...      webdataset shards: KEY.tokens.npy and KEY.json per sample
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from icl_moe.data.cache import FileCache
from icl_moe.data.location import MANIFEST_FILE, FileInfo, ShardFolder, open_folder
from icl_moe.errors import InputError, SampleError
from icl_moe.files import write_whole
from icl_moe.ranges import ImageSide, Natural
from icl_moe.sequence import LossOn, Role, SequenceFormat, Span, TokenSequence
from icl_moe.settings import from_dict, to_dict
from icl_moe.tokenizers import IMAGE_TOKENIZERS

SCHEMA_VERSION = 2


class IndexRow(NamedTuple):
    """A row of TASK.index.npy, one sample.

    shard: its number in the manifest. *_offset, *_size: where KEY.tokens.npy and KEY.json lie in
    it, in bytes. length: the number of tokens without padding. inputs, outputs: the number of
    tokens of these roles. crc32: the CRC-32 of KEY.tokens.npy followed by KEY.json. query_inputs,
    query_outputs: how many of the tokens of these roles belong to the query; None in an index of an
    earlier version, which lacks the columns.
    """

    shard: int
    tokens_offset: int
    tokens_size: int
    json_offset: int
    json_size: int
    length: int
    inputs: int
    outputs: int
    crc32: int
    query_inputs: int | None = None
    query_outputs: int | None = None


INDEX_TYPE = np.dtype(
    [(name, "<u8" if name.endswith("offset") else "<u4") for name in IndexRow._fields]
)
"""An `IndexRow` as it is stored."""

EARLIER_INDEX_TYPE = np.dtype(
    [(name, INDEX_TYPE[name]) for name in IndexRow._fields if not name.startswith("query_")]
)
"""The type in earlier versions, without the query's own counts."""

_LARGEST_GAP = 4096
"""Bytes between the two parts of a sample in its tar: padding and the second one's headers."""

_SPANS = re.compile(rb'"spans":(\[\[.*?\]\])')
"""The spans in KEY.json as it is packed, without spaces. A text cannot look like this, since its
quotes would be escaped.
"""

_FILE_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    """One tar: also its task and its number of samples."""

    task: str
    samples: Natural


TOKENIZER_FOLDERS = (*IMAGE_TOKENIZERS, "text_tokenizer")
"""Folders beside the shards; under the same name a manifest has the fingerprint of each that
exists.
"""


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds.

    image_tokenizer, text_tokenizer, mask_tokenizer, features_tokenizer: fingerprints; the last two
    are None if the image tokenizer encoded the masks, or read the input images. If others did both,
    image_tokenizer may be None. recipe: the data recipe. samples: per task. classes: samples per
    task and class. skipped: how much was left out, by task and reason. files: all files except the
    shards and the manifest itself. bad_images: for each task, the images that were left out because
    they cannot be used, each with the reason. standard: where the episodes are those of a file of
    `icl-moe episodes`, its header.
    """

    schema_version: int
    format: SequenceFormat
    examples: Natural
    image_size: ImageSide
    image_tokenizer: str | None
    text_tokenizer: str
    recipe: dict[str, Any]
    samples: dict[str, Natural]
    classes: dict[str, dict[str, Natural]]
    shards: tuple[ShardInfo, ...]
    skipped: dict[str, Natural]
    files: tuple[FileInfo, ...] = ()
    bad_images: dict[str, dict[str, str]] = field(default_factory=dict)
    mask_tokenizer: str | None = None
    features_tokenizer: str | None = None
    standard: dict[str, Any] | None = None

    @property
    def tokenizer_folders(self) -> tuple[str, ...]:
        """The folders beside the shards that a model needs as well."""
        return tuple(name for name in TOKENIZER_FOLDERS if getattr(self, name) is not None)

    @property
    def of_model(self) -> dict[str, Any]:
        """What the configuration of a model that is trained on the shards says of them, as plain
        values: `DecoderConfig` without what the recipe decides.
        """
        return {
            "format": to_dict(self.format),
            "image_size": self.image_size,
            "examples": self.examples,
            "image_tokenizer": self.image_tokenizer,
            "mask_tokenizer": self.mask_tokenizer,
            "features_tokenizer": self.features_tokenizer,
        }

    @classmethod
    def read(cls, folder: str | Path | ShardFolder) -> "Manifest":
        """The manifest of a folder. Raises InputError if there is none, or if it has another schema
        version.
        """
        opened = open_folder(folder) if isinstance(folder, str | Path) else folder
        origin = f"{opened.name}/{MANIFEST_FILE}"
        try:
            values = json.loads(opened.manifest_json)
        except ValueError as error:
            raise InputError(f"{origin} is not valid JSON.") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{origin} has schema_version {version!r}; this version of icl-moe reads "
                f"{SCHEMA_VERSION}: build the shards again."
            )
        manifest = from_dict(cls, values, origin)
        for info in (*manifest.shards, *manifest.files):
            if not _FILE_NAME.fullmatch(info.file):
                raise InputError(
                    f"{origin} names the file {info.file!r}; it must be a plain file name."
                )
        return manifest

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, completely or not at all."""
        write_whole(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=1) + "\n")

    def file(self, name: str) -> FileInfo:
        """The entry of one of `files`; raises InputError if it has none."""
        for info in self.files:
            if info.file == name:
                return info
        raise InputError(f"The manifest of these shards lacks the file {name}; build them again.")


@dataclass(frozen=True)
class Sample:
    """One episode. `shard` is its file's name; `json` is the unparsed content of KEY.json, since
    training does not need most of it.
    """

    key: str
    shard: str
    task: str
    sequence: TokenSequence
    json: bytes

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The content of KEY.json (see docs/shards.md). Raises SampleError if it is damaged."""
        try:
            meta = json.loads(self.json)
        except ValueError as error:
            raise SampleError(
                f"{self.shard}: sample {self.key} cannot be read: its JSON is not valid."
            ) from error
        if not isinstance(meta, dict) or not isinstance(meta.get("class"), str):
            raise SampleError(
                f"{self.shard}: sample {self.key} cannot be read: its JSON names no class."
            )
        return meta

    @property
    def category(self) -> str:
        """The name of its class."""
        return str(self.meta["class"])


class ShardSet:
    """Random access to the samples of a shard folder, at a path or a URL (see location.py). Holds
    neither index nor samples in memory.

    location: its name in messages. fingerprint: the sha256 of its manifest.

    Raises InputError if the folder, its manifest or its index is missing or broken, or if a shard
    is missing or its size differs from the manifest; `icl-moe shards verify` checks the hashes of
    local files.
    """

    def __init__(self, location: str | Path, cache: FileCache | None = None) -> None:
        self._folder = open_folder(location, cache)
        self.location = self._folder.name
        self.manifest = Manifest.read(self._folder)
        self.fingerprint = hashlib.sha256(self._folder.manifest_json).hexdigest()
        for shard in self.manifest.shards:
            self._folder.check(shard)
        self._files: OrderedDict[str, int] = OrderedDict()
        self._indices: dict[str, int] = {}
        self._index_types: dict[str, np.dtype] = {}
        self._first_row = {task: self._check_index(task) for task in self.manifest.samples}
        self._npy_header = _npy_header(self.manifest)

    @property
    def short_fingerprint(self) -> str:
        """What identifies the shards in records of models and evaluations: 16 of its digits."""
        return self.fingerprint[:16]

    def count(self, task: str) -> int:
        """How many samples of `task` there are; 0 for a task that the folder does not hold."""
        return self.manifest.samples.get(task, 0)

    def lengths(self, task: str) -> np.ndarray:
        """Length of each sample without padding, int64 (count,)."""
        return self._rows(task, range(self.count(task)))["length"].astype(np.int64)

    def target_counts(
        self, task: str, indices: Sequence[int], loss_on: LossOn = "all"
    ) -> np.ndarray:
        """Tokens of role input and tokens of role output of the samples `indices`, int64
        (len(indices), 2); of their queries alone with loss_on=query.

        Raises InputError if the index is of an earlier version, which does not count the queries'
        tokens.
        """
        if loss_on == "query" and self._index_types[task] != INDEX_TYPE:
            raise InputError(
                f"training.loss_on: the index {self.location}/{index_file(task)} does not count "
                "the queries' tokens, since an earlier version wrote it; build the shards again, "
                "or set training.loss_on=all."
            )
        rows = self._rows(task, indices)
        names = ("inputs", "outputs") if loss_on == "all" else ("query_inputs", "query_outputs")
        return np.stack([rows[name] for name in names], axis=1).astype(np.int64)

    def index_row(self, task: str, index: int) -> IndexRow:
        """The index's entry of a sample."""
        return IndexRow(*self._rows(task, (index,))[0].item())

    def sample(self, task: str, index: int) -> Sample:
        """Sample `index` of `task`, in the padded layout. Raises SampleError, naming shard and key,
        if it is corrupt.

        The checksum detects a sample that was overwritten, cut off or moved. A sample that was
        packed wrongly, with a matching checksum, is detected as far as `_check_tokens` and
        `_parse_spans` check; `icl-moe shards verify` checks more.
        """
        if not 0 <= index < self.count(task):
            raise InputError(
                f"{self.location} has {self.count(task)} samples of '{task}'; there is no sample "
                f"{index}."
            )
        row = self.index_row(task, index)
        key = sample_key(task, index)
        if row.shard >= len(self.manifest.shards):
            raise SampleError(
                f"{self.location}/{index_file(task)} is damaged: it has {key} in a shard that is "
                "not there."
            )
        shard = self.manifest.shards[row.shard]
        try:
            raw_tokens, raw_json = self._read(shard, row)
            tokens_L = self._parse_tokens(raw_tokens)
            _check_tokens(tokens_L, self.manifest)
            spans = _parse_spans(_SPANS.search(raw_json)[1], len(tokens_L))  # type: ignore[index]
        except (ValueError, TypeError, EOFError) as error:
            reason = (
                str(error).rstrip(".")
                if isinstance(error, InputError)
                else "it is no sample's data"
            )
            raise SampleError(
                f"{self.location}/{shard.file}: sample {key} cannot be read: {reason}."
            ) from error
        sequence = TokenSequence(tokens_L.astype(np.int64), np.arange(len(tokens_L)), spans)
        return Sample(key, shard.file, task, sequence, raw_json)

    def fetch(self, name: str) -> Path:
        """The folder `name` beside the shards, such as image_tokenizer, on this machine."""
        return self._folder.fetch(
            name, tuple(info for info in self.manifest.files if info.file.startswith(f"{name}/"))
        )

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for files in (self._files, self._indices):
            while files:
                os.close(files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # An open file belongs to its process.
        return {
            **self.__dict__,
            "_files": OrderedDict(),
            "_indices": {},
        }

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor failed
            self.close()

    def _rows(self, task: str, indices: Sequence[int]) -> np.ndarray:
        """Rows of a task's index (INDEX_TYPE or EARLIER_INDEX_TYPE), read directly from the
        file.
        """
        if not self.count(task):
            raise InputError(
                f"{self.location} has no samples of '{task}'; it holds "
                f"{', '.join(self.manifest.samples)}."
            )
        descriptor, start = self._open_index(task), self._first_row[task]
        kind = self._index_types[task]
        size = kind.itemsize
        content = b"".join([os.pread(descriptor, size, start + size * index) for index in indices])
        if len(content) != size * len(indices):
            raise SampleError(f"{self.location}/{index_file(task)} is cut off while it is read.")
        return np.frombuffer(content, kind)

    def _open_index(self, task: str) -> int:
        if task not in self._indices:
            self._indices[task] = self._folder.open(self.manifest.file(index_file(task)))
        return self._indices[task]

    def _check_index(self, task: str) -> int:
        """The offset of the first row of a task's index in its file. Raises InputError if the index
        does not have as many rows as the manifest says.
        """
        name, count = f"{self.location}/{index_file(task)}", self.count(task)
        with os.fdopen(os.dup(self._open_index(task)), "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                shape, _, dtype = (
                    np.lib.format.read_array_header_1_0(file)
                    if version == (1, 0)
                    else ((), False, None)
                )
            except ValueError as error:
                raise InputError(f"The index {name} is damaged.") from error
            if shape != (count,) or dtype not in (INDEX_TYPE, EARLIER_INDEX_TYPE):
                raise InputError(
                    f"The index {name} does not fit its manifest: it must have {count} rows of "
                    f"{IndexRow._fields}."
                )
            self._index_types[task] = dtype
            return file.tell()

    def _read(self, shard: ShardInfo, row: IndexRow) -> tuple[bytes, bytes]:
        """KEY.tokens.npy and KEY.json, which lie beside each other in the tar, in one read.

        It does not move the file's position: a forked worker may share the descriptor.
        """
        start = min(row.tokens_offset, row.json_offset)
        stop = max(row.tokens_offset + row.tokens_size, row.json_offset + row.json_size)
        if stop > shard.bytes or stop - start > row.tokens_size + row.json_size + _LARGEST_GAP:
            raise InputError("its place in the index is outside the shard")
        try:
            content = os.pread(self._open_shard(shard), stop - start, start)
        except OSError as error:
            raise InputError(f"reading it failed ({error.strerror})") from error
        if len(content) != stop - start:
            raise InputError("it is cut off; the shard is truncated")
        tokens = content[row.tokens_offset - start :][: row.tokens_size]
        meta = content[row.json_offset - start :][: row.json_size]
        if sample_checksum(tokens, meta) != row.crc32:
            raise InputError("its checksum differs from the index")
        return tokens, meta

    def _parse_tokens(self, raw: bytes) -> np.ndarray:
        """The array of KEY.tokens.npy: by comparing its header with the usual one, several times
        faster than parsing it.
        """
        if raw.startswith(self._npy_header):
            return np.frombuffer(
                raw, self.manifest.format.vocabulary.token_dtype, offset=len(self._npy_header)
            )
        # The header is unusual, so numpy's parser must read it.
        return np.load(io.BytesIO(raw), allow_pickle=False)

    def _open_shard(self, shard: ShardInfo) -> int:
        if shard.file not in self._files:
            if len(self._files) >= self._folder.open_files:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard.file] = self._folder.open(shard)
        self._files.move_to_end(shard.file)
        return self._files[shard.file]


def sample_key(task: str, index: int) -> str:
    """The KEY of sample `index` of `task` in its tar."""
    return f"{task}-{index:08d}"


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, with the first and the last among them."""
    places = np.linspace(0, count - 1, min(most, count))
    return [int(number) for number in np.unique(places.round().astype(int))]


def index_file(task: str) -> str:
    """The name of a task's index."""
    return f"{task}.index.npy"


def sample_checksum(tokens: bytes, meta: bytes) -> int:
    """CRC-32 of KEY.tokens.npy followed by KEY.json."""
    return zlib.crc32(meta, zlib.crc32(tokens))


def _npy_header(manifest: Manifest) -> bytes:
    """The header of every KEY.tokens.npy of a folder, since all have the same type and length."""
    tokens_L = np.zeros(
        manifest.format.length(manifest.examples + 1), manifest.format.vocabulary.token_dtype
    )
    buffer = io.BytesIO()
    np.save(buffer, tokens_L)
    return buffer.getvalue()[: -tokens_L.nbytes]


def _check_tokens(tokens_L: np.ndarray, manifest: Manifest) -> None:
    vocabulary = manifest.format.vocabulary
    length = manifest.format.length(manifest.examples + 1)
    if tokens_L.dtype != vocabulary.token_dtype or tokens_L.shape != (length,):
        raise InputError(
            f"its tokens are {tokens_L.dtype} {tokens_L.shape}; {vocabulary.token_dtype} "
            f"({length},) are expected"
        )
    for token in (int(tokens_L.min()), int(tokens_L.max())):
        if not 0 <= token < vocabulary.ids:
            raise InputError(f"it has the token {token}; the vocabulary has {vocabulary.ids}")


@lru_cache(maxsize=1024)  # All episodes of segmentation have the same spans.
def _parse_spans(raw: bytes, length: int) -> tuple[Span, ...]:
    """The spans of a sequence of `length` tokens, from JSON; raises InputError if they do not cover
    it in order.
    """
    spans = tuple(Span(*span) for span in json.loads(raw))
    position = 0
    for span in spans:
        if span.role not in get_args(Role) or not 0 <= span.attributes <= 255:
            raise InputError(
                f"a span has the role {span.role!r} and the attribute class {span.attributes!r}"
            )
        if span.start != position or span.length < 1:
            raise InputError(
                f"a span starts at {span.start} where the one before ends at {position}"
            )
        position = span.stop
    if position != length:
        raise InputError(f"its spans cover {position} of {length} tokens")
    return spans
