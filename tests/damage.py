"""Damages samples of a shard folder: bytes that change on the disk, or that a faulty writer
wrote.
"""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from icl_moe.data.location import FileInfo
from icl_moe.data.shards import Manifest, ShardInfo


def overwrite(
    folder: Path,
    task: str,
    index: int,
    part: str,
    change: Callable[[bytes], bytes],
    as_packed: bool = False,
) -> None:
    """Change one part (tokens or json) of one sample without changing its length. as_packed: also
    update checksum and hashes.
    """
    rows = np.load(folder / f"{task}.index.npy")
    row = rows[index]
    manifest = Manifest.read(folder)
    path = folder / manifest.shards[row["shard"]].file
    content = bytearray(path.read_bytes())
    places = {
        name: slice(int(row[f"{name}_offset"]), int(row[f"{name}_offset"] + row[f"{name}_size"]))
        for name in ("tokens", "json")
    }
    changed = change(bytes(content[places[part]]))
    assert len(changed) == row[f"{part}_size"]
    content[places[part]] = changed
    path.write_bytes(content)
    if as_packed:
        row["crc32"] = zlib.crc32(content[places["tokens"]] + content[places["json"]])
        np.save(folder / f"{task}.index.npy", rows)
        _hash_anew(folder, manifest)


def _hash_anew(folder: Path, manifest: Manifest) -> None:
    shards = [
        ShardInfo(**vars(FileInfo.of(folder, shard.file)), task=shard.task, samples=shard.samples)
        for shard in manifest.shards
    ]
    files = [FileInfo.of(folder, info.file) for info in manifest.files]
    dataclasses.replace(manifest, shards=tuple(shards), files=tuple(files)).write(folder)
