"""`icl-moe shards verify`: whether a shard folder is complete and correct."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from icl_moe.data.location import ShardFolder, open_folder
from icl_moe.data.shards import Manifest, Sample, ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EvaluationEpisode
from icl_moe.sequence import Episode, SequenceCodec
from icl_moe.tasks import find_task
from icl_moe.tokenizers.text import TextTokenizer
from preprocessing.pack import query_lengths, role_lengths


def verify_shards(location: str | Path) -> Manifest:
    """Check the hash of every file, read and decode every sample, and return the manifest.
    `location` is a path or a URL.

    Raises InputError that names all damaged files, or the first wrong sample.
    """
    folder = open_folder(location)
    manifest = Manifest.read(folder)
    _verify_files(folder, manifest)
    shards = ShardSet(location)
    codec = open_codec(shards)
    for task, count in manifest.samples.items():
        classes = Counter[str]()
        for index in tqdm(range(count), desc=f"reading {task}", unit="sample"):
            sample = shards.sample(task, index)
            classes[sample.category] += 1
            try:
                _verify_sample(sample, codec, manifest)
                _verify_index(sample, shards, index)
            except InputError as error:
                raise InputError(
                    f"{folder.name}/{sample.shard}: sample {sample.key} is corrupt: {error}"
                ) from error
        if classes != manifest.classes.get(task):
            raise InputError(
                f"{folder.name}: the manifest's class counts of {task} differ from those of the "
                "samples."
            )
    return manifest


def open_codec(shards: ShardSet) -> SequenceCodec:
    """The codec of a shard folder's sequences. Raises InputError if its text tokenizer is not the
    manifest's.
    """
    manifest = shards.manifest
    text = TextTokenizer(
        manifest.format.vocabulary.text_merges, str(shards.fetch("text_tokenizer"))
    )
    if text.fingerprint != manifest.text_tokenizer:
        raise InputError(
            f"{shards.location}/text_tokenizer is not the text tokenizer that the manifest names."
        )
    return SequenceCodec(manifest.format, text)


def _verify_files(folder: ShardFolder, manifest: Manifest) -> None:
    damaged = []
    files = (*manifest.shards, *manifest.files)
    for info in tqdm(files, desc="hashing", unit="file"):
        try:
            with os.fdopen(folder.open(info), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    damaged.append(
                        f"The sha256 of {folder.name}/{info.file} differs from the manifest"
                    )
        except InputError as error:
            damaged.append(str(error).rstrip("."))
    if damaged:
        raise InputError(f"{len(damaged)} of {len(files)} files are damaged: {'; '.join(damaged)}.")


def _verify_sample(sample: Sample, codec: SequenceCodec, manifest: Manifest) -> None:
    """Check that the sequence decodes and encodes to itself again, and that KEY.json agrees with
    it.
    """
    meta = sample.meta
    pairs = manifest.examples + 1
    for name in ("sources", "scale"):
        if not isinstance(meta.get(name), list) or len(meta[name]) != pairs:
            raise InputError(f"its JSON must have {pairs} {name}.")
    if meta.get("task") != sample.task:
        raise InputError(f"its JSON names the task {meta.get('task')!r}.")
    task = find_task(sample.task, "the manifest")
    episode = codec.decode(sample.sequence, task)
    if len(episode.pairs) != pairs:
        raise InputError(f"its sequence holds {len(episode.pairs)} pairs.")
    again = codec.encode(Episode(task, sample.category, episode.pairs))
    if (
        not np.array_equal(again.tokens_L, sample.sequence.tokens_L)
        or again.spans != sample.sequence.spans
    ):
        raise InputError("its sequence differs from the encoding of its pairs.")
    truth = EvaluationEpisode(sample.key, task, sample.category, episode.pairs, meta)
    task.verify(truth, manifest.image_size)


def _verify_index(sample: Sample, shards: ShardSet, index: int) -> None:
    row = shards.index_row(sample.task, index)
    query = query_lengths(sample.sequence) if row.query_inputs is not None else (None, None)
    found = (*role_lengths(sample.sequence), *query)
    if found != (row.length, row.inputs, row.outputs, row.query_inputs, row.query_outputs):
        raise InputError("its lengths differ from the index.")
