"""A shard folder returns what was packed, webdataset can read it, and damage is reported."""

import hashlib
import io
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from damage import overwrite

from icl_moe.data.shards import EARLIER_INDEX_TYPE, ShardSet
from icl_moe.errors import InputError, SampleError
from icl_moe.sequence import SequenceCodec
from icl_moe.tasks import TASKS
from icl_moe.tokenizers.text import TextTokenizer
from preprocessing.verify import verify_shards

SAMPLES = {"segmentation": 25, "captioning": 25}


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_manifest_counts_what_the_index_holds(folder):
    shards = ShardSet(folder)
    assert shards.manifest.samples == SAMPLES
    assert [shard.samples for shard in shards.manifest.shards] == [10, 10, 5] * 2
    for task, count in SAMPLES.items():
        assert shards.count(task) == count
        assert sum(shards.manifest.classes[task].values()) == count
        assert shards.lengths(task).shape == (count,)
        assert shards.target_counts(task, range(count)).shape == (count, 2)
    assert shards.count("depth") == 0


def test_any_sample_can_be_read_and_agrees_with_index_and_manifest(folder):
    shards = ShardSet(folder)
    format = shards.manifest.format
    codec = SequenceCodec(format, TextTokenizer(format.vocabulary.text_merges))
    for task in SAMPLES:
        for index in (24, 0, 13):
            sample = shards.sample(task, index)
            assert sample.key == f"{task}-{index:08d}"
            assert sample.task == task
            assert len(sample.sequence) == format.length(3)
            assert len(sample.sequence.unpadded()) == shards.lengths(task)[index]
            weights = sample.sequence.loss_weights(input_weight=0.5)
            assert [(weights == 0.5).sum(), (weights == 1.0).sum()] == shards.target_counts(
                task, [index]
            )[0].tolist()
            episode = codec.decode(sample.sequence, TASKS[sample.task])
            assert len(episode.pairs) == len(sample.meta["sources"]) == 3
            if task == "captioning":
                assert [pair.caption for pair in episode.pairs] == sample.meta["captions"]
                assert {pair.category for pair in episode.pairs} == {sample.category}
                assert sample.meta["captions"][-1] in sample.meta["references"][0]


def test_the_index_counts_the_querys_targets(folder):
    shards = ShardSet(folder)
    for task in SAMPLES:
        for index in (24, 0, 13):
            weights = shards.sample(task, index).sequence.loss_weights(0.5, "query")
            assert [(weights == 0.5).sum(), (weights == 1.0).sum()] == shards.target_counts(
                task, [index], "query"
            )[0].tolist()


def test_an_index_of_an_earlier_version_is_read_but_cannot_count_queries(folder, damaged):
    manifest = json.loads((damaged / "manifest.json").read_text())
    for task in SAMPLES:
        path = damaged / f"{task}.index.npy"
        rows = np.load(path)
        np.save(path, rows[[name for name in rows.dtype.names if "query" not in name]].copy())
        np.save(path, np.load(path).astype(EARLIER_INDEX_TYPE))
        for info in manifest["files"]:
            if info["file"] == path.name:
                info["bytes"] = path.stat().st_size
                info["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(damaged / "manifest.json", files=manifest["files"])
    shards, whole = ShardSet(damaged), ShardSet(folder)
    for task, count in SAMPLES.items():
        assert np.array_equal(shards.lengths(task), whole.lengths(task))
        assert shards.sample(task, 7).json == whole.sample(task, 7).json
        with pytest.raises(InputError, match=r"training\.loss_on: .*build the shards again"):
            shards.target_counts(task, range(count), "query")
    verify_shards(damaged)


def test_webdataset_reads_every_sample_in_order(folder):
    shards = ShardSet(folder)
    for task, count in SAMPLES.items():
        tars = [str(folder / shard.file) for shard in shards.manifest.shards if shard.task == task]
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        assert len(samples) == count
        for index, sample in enumerate(samples):
            expected = shards.sample(task, index)
            assert sample["__key__"] == expected.key
            assert sample["tokens.npy"].dtype == np.uint16
            np.testing.assert_array_equal(sample["tokens.npy"], expected.sequence.tokens_L)
            assert sample["json"] == expected.meta


def test_headers_of_the_tars_hold_no_time_and_no_name(folder):
    with tarfile.open(folder / "captioning-000000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in archive} == {(0, 0, 0, "", "")}


def test_a_shard_set_travels_to_other_processes(folder):
    shards = ShardSet(folder)
    shards.sample("captioning", 3)
    again = pickle.loads(pickle.dumps(shards))
    assert again.sample("captioning", 3).meta == shards.sample("captioning", 3).meta


def test_many_shards_do_not_hold_many_files_open(folder, monkeypatch):
    monkeypatch.setattr("icl_moe.data.location.LocalFolder.open_files", 2)
    shards = ShardSet(folder)
    keys = [shards.sample(task, index).key for task in SAMPLES for index in (0, 10, 20, 0)]
    assert len(keys) == 8
    assert len(shards._files) == 2


def test_a_sample_that_is_not_there_is_refused(folder):
    with pytest.raises(InputError, match="has 25 samples of 'captioning'; there is no sample 25"):
        ShardSet(folder).sample("captioning", 25)
    with pytest.raises(
        InputError, match="has no samples of 'depth'; it holds segmentation, captioning"
    ):
        ShardSet(folder).lengths("depth")


def test_a_folder_without_shards_says_how_to_make_them(tmp_path):
    with pytest.raises(
        InputError,
        match=(
            r"there are no shards in .*, which has no manifest.json; `icl-moe shards build` makes "
            r"them"
        ),
    ):
        ShardSet(tmp_path)


def test_a_truncated_or_missing_shard_is_named(damaged):
    tar = damaged / "segmentation-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(
        InputError,
        match=r"segmentation-000001.tar is truncated: it has 5000 bytes, the manifest says \d+",
    ):
        ShardSet(damaged)
    tar.unlink()
    with pytest.raises(InputError, match=r"segmentation-000001.tar is missing"):
        ShardSet(damaged)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(damaged):
    shards = ShardSet(damaged)
    shards.sample("segmentation", 11)
    tar = damaged / "segmentation-000001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(
        InputError,
        match=(
            r"segmentation-000001.tar: sample segmentation-00000012 cannot be read: it is cut "
            r"off"
        ),
    ):
        shards.sample("segmentation", 12)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("tokens", lambda raw: b"\0" * len(raw), "it is no sample's data"),
        (
            "tokens",
            lambda raw: npy(np.zeros((len(raw) - 128) // 2, np.int16)),
            r"its tokens are int16 .*; uint16 .* are expected",
        ),
        (
            "tokens",
            lambda raw: npy(np.zeros((1, (len(raw) - 128) // 2), np.uint16)),
            r"its tokens are uint16 \(1, ",
        ),
        (
            "tokens",
            lambda raw: raw[:-2] + b"\xff\xff",
            r"it has the token 65535; the vocabulary has \d+",
        ),
        (
            "json",
            lambda raw: raw.replace(b'"spans":[[0,1,', b'"spans":[[0,2,', 1),
            "a span starts at 1 where the one before ends at 2",
        ),
        (
            "json",
            lambda raw: raw.replace(b'"marker"', b'"outlaw"', 1),
            "a span has the role 'outlaw'",
        ),
        ("json", lambda raw: raw.replace(b'"spans"', b'"spins"', 1), "it is no sample's data"),
    ],
)
def test_a_sample_that_was_packed_wrong_is_named_by_shard_and_key(damaged, part, change, message):
    overwrite(damaged, "captioning", 12, part, change, as_packed=True)
    shards = ShardSet(damaged)
    shards.sample("captioning", 11)
    with pytest.raises(
        SampleError,
        match=r"captioning-000001.tar: sample captioning-00000012 cannot be read: " + message,
    ):
        shards.sample("captioning", 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"[" + raw[1:], "its JSON is not valid"),
        (lambda raw: raw.replace(b'"class":', b'"clbss":', 1), "its JSON names no class"),
    ],
)
def test_json_that_was_packed_wrong_is_named_by_shard_and_key(damaged, change, message):
    overwrite(damaged, "captioning", 12, "json", change, as_packed=True)
    with pytest.raises(
        SampleError,
        match=r"captioning-000001.tar: sample captioning-00000012 cannot be read: " + message,
    ):
        _ = ShardSet(damaged).sample("captioning", 12).meta


@pytest.mark.parametrize("part", ["tokens", "json"])
@pytest.mark.parametrize("place", [0, 200, -1])
def test_any_changed_byte_of_a_sample_is_noticed(damaged, part, place):
    def flip_a_bit(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[place] ^= 1  # This keeps a token a valid token, and text valid text.
        return bytes(changed)

    overwrite(damaged, "segmentation", 12, part, flip_a_bit)
    shards = ShardSet(damaged)
    shards.sample("segmentation", 11)
    with pytest.raises(
        SampleError,
        match=r"sample segmentation-00000012 cannot be read: its checksum differs from the index",
    ):
        shards.sample("segmentation", 12)


def test_an_index_that_is_cut_off_while_it_is_read_is_named(damaged):
    shards = ShardSet(damaged)
    path = damaged / "segmentation.index.npy"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SampleError, match=r"segmentation.index.npy is cut off while it is read"):
        shards.sample("segmentation", 24)


def test_a_shard_that_vanishes_while_it_is_read_is_named_with_the_key(damaged):
    shards = ShardSet(damaged)
    (damaged / "segmentation-000001.tar").unlink()
    with pytest.raises(
        SampleError,
        match=(
            r"sample segmentation-00000012 cannot be read: The file .*segmentation-000001.tar is "
            r"missing"
        ),
    ):
        shards.sample("segmentation", 12)


def test_a_manifest_of_another_schema_or_with_strange_contents_is_refused(damaged):
    path = damaged / "manifest.json"
    edit_json(path, schema_version=99)
    with pytest.raises(
        InputError,
        match="has schema_version 99; this version of icl-moe reads 2: build the shards again",
    ):
        ShardSet(damaged)
    edit_json(path, schema_version=2, exmaples=2)
    with pytest.raises(InputError, match="unknown key 'exmaples'"):
        ShardSet(damaged)
    path.write_text("{")
    with pytest.raises(InputError, match=r"manifest.json is not valid JSON"):
        ShardSet(damaged)


@pytest.mark.parametrize("kind", ["shards", "files"])
@pytest.mark.parametrize(
    "name", ["../outside.tar", "/outside.tar", "..", ".hidden", "a/b/c.tar", "a/../b", "a?b", ""]
)
def test_a_file_name_that_leaves_the_folder_is_refused(damaged, kind, name):
    path = damaged / "manifest.json"
    files = json.loads(path.read_text())[kind]
    files[0]["file"] = name
    edit_json(path, **{kind: files})
    with pytest.raises(
        InputError, match=f"names the file {re.escape(repr(name))}; it must be a plain file name"
    ):
        ShardSet(damaged)


def test_an_index_that_is_missing_damaged_or_of_other_shards_is_refused(damaged):
    path = damaged / "captioning.index.npy"
    rows = np.load(path)
    content = path.read_bytes()
    path.write_bytes(content[:300])
    with pytest.raises(InputError, match=r"captioning.index.npy is truncated: it has 300 bytes"):
        ShardSet(damaged)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(InputError, match=r"The index .*captioning.index.npy is damaged"):
        ShardSet(damaged)
    path.write_bytes(content.replace(b"(25,)", b"(24,)"))
    with pytest.raises(
        InputError, match=r"captioning.index.npy does not fit its manifest: it must have 25 rows"
    ):
        ShardSet(damaged)
    rows["shard"] += 6
    np.save(path, rows)
    with pytest.raises(
        SampleError,
        match=(
            r"captioning.index.npy is damaged: it has captioning-00000003 in a shard that is not "
            r"there"
        ),
    ):
        ShardSet(damaged).sample("captioning", 3)
    path.unlink()
    with pytest.raises(InputError, match=r"captioning.index.npy is missing"):
        ShardSet(damaged)


@pytest.mark.parametrize("column", ["tokens_offset", "tokens_size", "json_offset", "json_size"])
@pytest.mark.parametrize("value", [0, 1, 2**31])
def test_an_index_row_that_points_elsewhere_is_noticed(damaged, column, value):
    rows = np.load(damaged / "captioning.index.npy")
    rows[column][3] = value
    np.save(damaged / "captioning.index.npy", rows)
    with pytest.raises(SampleError, match=r"sample captioning-00000003 cannot be read"):
        ShardSet(damaged).sample("captioning", 3)


def test_a_file_name_that_no_folder_can_hold_is_refused_in_a_sentence(damaged):
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["file"] = "1" * 300
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"1111 (is missing|cannot be read)"):
        ShardSet(damaged)
