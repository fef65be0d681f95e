"""A shard folder as its readers see it: manifest, offset index, and any sample by its number.

manifest.json            what the shards hold and how they were made; `Manifest`
index.npz                where each sample lies, and its lengths
image_tokenizer/         the VQGAN that made the codes; text_tokenizer/ likewise
TASK-000000.tar ...      webdataset shards: KEY.tokens.npy and KEY.json per sample
"""

import contextlib
import io
import json
import os
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.recipe import from_dict
from icl_moe.sequence import Role, SequenceFormat, Span, TokenSequence

SCHEMA_VERSION = 1
MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.npz"
INDEX_ARRAYS = ("shard", "tokens", "json", "lengths", "targets")
"""Arrays of index.npz for each task, named TASK.ARRAY, a row a sample: the number of its shard in the manifest; offset and size in
bytes of KEY.tokens.npy and of KEY.json; length without padding; tokens of role input and of role output."""

_OPEN_FILES = 64


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, task, number of samples, size in bytes and sha256 (hex)."""

    file: str
    task: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds.

    image_tokenizer, text_tokenizer: fingerprints. recipe: the data recipe. samples: per task. classes: samples per task and class.
    skipped: how much was left out, by task and reason.
    """

    schema_version: int
    format: SequenceFormat
    examples: int
    image_size: int
    image_tokenizer: str
    text_tokenizer: str
    recipe: dict[str, Any]
    samples: dict[str, int]
    classes: dict[str, dict[str, int]]
    shards: tuple[ShardInfo, ...]
    skipped: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of `folder`; raises InputError where there is none, or one of another schema."""
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no shards: it has no {MANIFEST_FILE}; `icl-moe shards build` makes them.")
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON.") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise InputError(f"{path} has schema_version {version!r}; this version of icl-moe reads {SCHEMA_VERSION}.")
        manifest = from_dict(cls, values, origin=str(path))
        for shard in manifest.shards:
            if Path(shard.file).name != shard.file:
                raise InputError(f"{path} names the shard {shard.file!r}; a plain file name belongs there.")
        return manifest

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`, whole or not at all."""
        write_whole(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Sample:
    """One episode. `shard` is its file's name, `category` its class, `meta` the content of KEY.json (see docs/shards.md)."""

    key: str
    shard: str
    task: str
    category: str
    sequence: TokenSequence
    meta: dict[str, Any]


class ShardSet:
    """Random access to the samples of a shard folder. Holds the index in memory, samples never.

    Raises InputError where the folder, its manifest or its index is missing or broken, and where a shard is missing or has another
    size than the manifest says; hashes are `icl-moe shards verify`'s to check.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self._index = _read_index(self.folder, self.manifest)
        for shard in self.manifest.shards:
            check_size(self.folder, shard)
        self._files: OrderedDict[str, int] = OrderedDict()

    def count(self, task: str) -> int:
        """How many samples of `task` there are; 0 for a task that the folder does not hold."""
        return self.manifest.samples.get(task, 0)

    def lengths(self, task: str) -> np.ndarray:
        """Length of each sample without padding, int64 (count,)."""
        return self._array(task, "lengths")

    def target_counts(self, task: str) -> np.ndarray:
        """Tokens of role input and tokens of role output of each sample, int64 (count, 2)."""
        return self._array(task, "targets")

    def sample(self, task: str, index: int) -> Sample:
        """Sample `index` of `task`, in the padded layout. Raises InputError, naming shard and key, where it is corrupt."""
        if not 0 <= index < self.count(task):
            raise InputError(f"{self.folder} has {self.count(task)} samples of '{task}'; there is no sample {index}.")
        shard = self.manifest.shards[int(self._array(task, "shard")[index])].file
        key = sample_key(task, index)
        raw_tokens, raw_json = (self._read(shard, key, *self._array(task, part)[index].tolist()) for part in ("tokens", "json"))
        try:
            meta = json.loads(raw_json)
            spans = tuple(Span(*span) for span in meta["spans"])
            tokens_L = np.load(io.BytesIO(raw_tokens), allow_pickle=False)
            category = str(meta["class"])
            _check_sequence(tokens_L, spans, self.manifest)
        except (ValueError, KeyError, TypeError, EOFError) as error:
            reason = error if isinstance(error, InputError) else "it is no sample's data"
            raise InputError(f"{self.folder / shard}: sample {key} is corrupt: {str(reason).rstrip('.')}.") from error
        sequence = TokenSequence(tokens_L.astype(np.int64), np.arange(len(tokens_L)), spans)
        return Sample(key, shard, task, category, sequence, meta)

    def close(self) -> None:
        """Close the shards' files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # an open file belongs to its process

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor failed
            self.close()

    def _array(self, task: str, name: str) -> np.ndarray:
        if not self.count(task):
            raise InputError(f"{self.folder} has no samples of '{task}'; it holds {', '.join(self.manifest.samples)}.")
        return self._index[f"{task}.{name}"]

    def _read(self, shard: str, key: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, read without moving the file's position: a forked worker may share the descriptor."""
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        content = os.pread(self._files[shard], size, offset)
        if len(content) != size:
            raise InputError(f"{self.folder / shard}: sample {key} is cut off; the shard is truncated.")
        return content


def sample_key(task: str, index: int) -> str:
    """The KEY of sample `index` of `task` in its tar."""
    return f"{task}-{index:08d}"


def check_size(folder: Path, shard: ShardInfo) -> None:
    """Raise InputError where a shard is missing or not of the size that the manifest says."""
    path = folder / shard.file
    if not path.is_file():
        raise InputError(f"The shard {path} is missing.")
    size = path.stat().st_size
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "too long"
        raise InputError(f"The shard {path} is {kind}: it has {size} bytes, the manifest says {shard.bytes}.")


def _read_index(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    path = folder / INDEX_FILE
    try:
        with np.load(path, allow_pickle=False) as archive:
            index = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"The index {path} is missing.") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"The index {path} is damaged.") from error
    for task, count in manifest.samples.items():
        for name in INDEX_ARRAYS:
            columns = (count, 2) if name in ("tokens", "json", "targets") else (count,)
            array = index.get(f"{task}.{name}")
            if array is None or array.shape != columns or array.dtype != np.int64:
                raise InputError(f"The index {path} does not fit its manifest: {task}.{name} must be of shape {columns}.")
        shard_numbers = index[f"{task}.shard"]
        if count and not 0 <= shard_numbers.min() <= shard_numbers.max() < len(manifest.shards):
            raise InputError(f"The index {path} does not fit its manifest: {task}.shard names a shard that is not there.")
    return index


def _check_sequence(tokens_L: np.ndarray, spans: tuple[Span, ...], manifest: Manifest) -> None:
    vocabulary = manifest.format.vocabulary
    length = manifest.format.length(manifest.examples + 1)
    if tokens_L.dtype != vocabulary.token_dtype or tokens_L.shape != (length,):
        raise InputError(f"its tokens are {tokens_L.dtype} {tokens_L.shape}; {vocabulary.token_dtype} ({length},) belong there")
    if int(tokens_L.max()) >= vocabulary.size:
        raise InputError(f"it has the token {int(tokens_L.max())}; the vocabulary has {vocabulary.size}")
    position = 0
    for span in spans:
        if span.role not in get_args(Role) or not 0 <= span.attributes <= 255:
            raise InputError(f"a span has the role {span.role!r} and the attribute class {span.attributes!r}")
        if span.start != position or span.length < 1:
            raise InputError(f"a span starts at {span.start} where the one before ends at {position}")
        position = span.stop
    if position != length:
        raise InputError(f"its spans cover {position} of {length} tokens")
