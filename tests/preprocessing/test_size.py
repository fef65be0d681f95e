"""Data sets of millions of annotations: files are read piece by piece, regions are held in tables,
and one process plans for all. The pieces and tables here are tiny, so that there are many of them.
"""

import io
import json
import random
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from small_builds import regions_of_classes

from icl_moe.boxes import Box
from icl_moe.errors import InputError
from icl_moe.inputs import with_whole_characters
from icl_moe.processes import on_first, share_of
from icl_moe.sequence import SequenceCodec, SequenceFormat, TooLongError
from icl_moe.tasks.caption_template import CaptionText, longest_caption, write_caption
from icl_moe.tasks.captioning import CaptionTarget
from icl_moe.tasks.segmentation import MaskTarget
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary
from preprocessing import json_stream
from preprocessing.coco import load_instances, read_segmentation
from preprocessing.json_stream import NotPlainError, decode_piece, list_pieces, object_members
from preprocessing.pack import _Archive
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import CaptioningSource, SegmentationSource
from preprocessing.region_table import RegionTable
from preprocessing.visual_genome import read_captioning


class All:
    def keep(self, items, folder, pool):
        return list(items)


def some_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(8)
    if kind == 0 and depth < 3:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth < 3:
        return {f'k"\\{n}': some_value(rng, depth + 1) for n in range(rng.randrange(4))}
    if kind == 2:
        return rng.choice(["a", '"', "\\", '\\\\"', "]}{[,", "é", ""])
    return rng.choice([None, True, rng.random(), rng.randrange(1000)])


def members_of(file: Path) -> dict:
    found: dict = {}
    for key, value in object_members(file):
        found[key] = found.get(key, []) + value if isinstance(value, list) else value
    return found


def entries_of(file: Path) -> list:
    return [entry for piece in list_pieces(file) for entry in decode_piece(piece)]


def test_pieces_hold_what_the_whole_file_holds_wherever_they_are_cut(tmp_path, monkeypatch):
    rng, file = random.Random(0), tmp_path / "file.json"
    for _ in range(300):
        monkeypatch.setattr(json_stream, "BLOCK", rng.choice([1, 3, 7, 50, 1000]))
        for value, read in (
            ({f"k{n}": some_value(rng) for n in range(rng.randrange(1, 4))}, members_of),
            ([some_value(rng) for _ in range(rng.randrange(6))], entries_of),
        ):
            text = json.dumps(value, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
            file.write_text(rng.choice(["", "\ufeff", " \n"]) + text)
            assert read(file) == value


def test_a_file_that_is_not_whole_json_is_never_read_in_pieces(tmp_path, monkeypatch):
    rng, file = random.Random(1), tmp_path / "file.json"
    refused = 0
    for _ in range(600):
        monkeypatch.setattr(json_stream, "BLOCK", rng.choice([1, 5, 40]))
        text = json.dumps([some_value(rng) for _ in range(4)])
        place, other = rng.randrange(len(text)), rng.choice('"\\[]{},: 1')
        text = text[:place] + rng.choice([other, ""]) + text[place + rng.randrange(2) :]
        file.write_text(text)
        try:
            expected = json.loads(text)
        except ValueError:
            expected = None
        try:
            assert entries_of(file) == expected
        except NotPlainError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("block", [1, 60, 5000])
def test_a_coco_file_gives_the_same_pool_in_pieces_of_any_size(coco_folder, monkeypatch, block):
    source = SegmentationSource(images=str(coco_folder.images), annotations=str(coco_folder.file))
    expected = read_segmentation(source, 80, All(), 0)
    monkeypatch.setattr(json_stream, "BLOCK", block)
    found = read_segmentation(source, 80, All(), 2)
    assert found.regions == expected.regions
    assert found.skipped == expected.skipped
    coco_folder.file.write_text(json.dumps(coco_folder.content), encoding="utf-16")
    assert read_segmentation(source, 80, All(), 0).regions == expected.regions


def test_annotations_take_little_more_memory_than_their_file(coco_folder):
    points = [round(1 + n % 70 + n / 1000, 4) for n in range(400)]

    def add_long_outlines(content):
        content["annotations"] = [
            {**content["annotations"][0], "id": number, "segmentation": [points]}
            for number in range(1500)
        ]

    size = coco_folder.write(add_long_outlines).stat().st_size
    tracemalloc.start()
    load_instances(coco_folder.file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * json_stream.BLOCK * 4 + 2 * size, "as lists they take five times as much"


def genome_source(folder, **settings) -> CaptioningSource:
    files = {key: str(folder.file(key)) for key in ("objects", "image_data")}
    regions = str(folder.file("region_descriptions"))
    return CaptioningSource(
        images=str(folder.images), regions=regions, min_descriptions=0, **files, **settings
    )


def test_processes_read_visual_genome_as_one_does_and_find_the_same_error_first(
    genome_folder, monkeypatch
):
    expected = read_captioning(genome_source(genome_folder), All())
    monkeypatch.setattr(json_stream, "BLOCK", 100)
    found = read_captioning(genome_source(genome_folder), All(), workers=2)
    assert found.regions == expected.regions
    assert found.skipped == expected.skipped
    records = genome_folder.content["region_descriptions"]
    records[3]["regions"][0]["phrase"] = 7
    records[1]["regions"][2]["x"] = "wide"
    genome_folder.write()
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"image 2, region 23 has the box"):
            read_captioning(genome_source(genome_folder), All(), workers)
    records[2] = records[0]
    del records[1]["regions"][2]
    genome_folder.write()
    with pytest.raises(InputError, match="two records of image 1"):
        read_captioning(genome_source(genome_folder), All(), 2)


def test_lone_surrogates_are_looked_for_in_an_entrys_own_text():
    text = '"\\ud83d" "x"'
    assert with_whole_characters("\ud83d", text, 0, 8) == "\ufffd"
    assert with_whole_characters("\ud83d", text, 9) == "\ud83d", "no search beyond the entry"


# --- Tables --------------------------------------------------------------------------------------


def make_regions() -> list[PoolRegion]:
    images = [ImageFile(Path(f"/data/é/{n}.jpg"), f"é/{n}.jpg", 100, 80) for n in range(3)]
    box: Box = (0.1, 1 / 3, 0.7, 1.0)
    described = (("cat", "place", "a cat", box), ("dog", "", "two\ndogs", box))
    mask = MaskTarget(b"abc", (("cat", b"abc"), ("dog", b"PQ`0\\")))
    return [
        PoolRegion(images[0], "cat", (1, "two", 3.0), (0, 0, 80, 80), 1 / 3, mask),
        PoolRegion(
            images[1],
            "dog",
            (4,),
            (1, 2, 3, 4),
            1e-7,
            MaskTarget(b"xyz", (("dog", b"xy"),), b"ignored"),
            origin="photo.jpg",
            instance=("a", 7),
            provenance=({"image": "photo.jpg", "light": [1.0, 0.5]},),
            role="query",
            group="rare",
        ),
        PoolRegion(
            images[2],
            "cat",
            (5,),
            (0, 0, 100, 80),
            0.5,
            CaptionTarget(box, "a cat", ("a cat", "Katze ü"), described),
            "place",
        ),
        PoolRegion(
            images[2], "dog", (6,), (0, 0, 100, 80), 0.5, CaptionTarget(box, "x", ("x",), described)
        ),
    ]


def everything(regions) -> list:
    """All fields of the regions, including those that are ignored when regions are compared."""
    return [(r, r.role, r.group, r.target, tuple(r.target.objects)) for r in regions]


def test_a_table_gives_back_its_regions_also_from_files_and_in_parts(tmp_path):
    regions = make_regions()
    table = RegionTable.of(regions)
    table.save(tmp_path / "table")
    stored = RegionTable.open(tmp_path / "table")
    joined = RegionTable.concatenate([RegionTable.of(regions[:1]), RegionTable.of(regions[1:])])
    for view in (table, stored, joined):
        assert view == regions
        assert everything(view) == everything(regions)
        assert view[-1] == regions[-1] and view[1:3] == regions[1:3]
        assert everything(view.select(np.array([3, 0]))) == everything([regions[3], regions[0]])
    assert stored.digest() == table.digest() != table.select(np.array([1])).digest()
    roles = [replace(region, role="example") for region in regions]
    assert everything(table.with_role("example")) == everything(roles)
    groups = [replace(r, group="frequent" if r.category == "cat" else "") for r in regions]
    assert everything(table.with_groups({"cat": "frequent"})) == everything(groups)
    empty = RegionTable.of([])
    empty.save(tmp_path / "empty")
    assert RegionTable.open(tmp_path / "empty") == RegionTable.concatenate([]) == []


def test_pools_count_and_choose_alike_in_both_forms():
    regions = make_regions()
    for listed, stored in (
        (Pool("x", regions), Pool("x", RegionTable.of(regions))),
        (Pool("x", regions[2:]), Pool("x", RegionTable.of(regions[2:]))),
    ):
        assert regions_of_classes(listed) == regions_of_classes(stored)
        assert listed.by_kind() == stored.by_kind()
        assert listed.class_counts() == stored.class_counts()
        for pool in (listed, stored):
            pool.drop_small_classes(images=1)
            pool.drop_classes({"cat"}, "why")
        assert listed.regions == stored.regions
        assert listed.skipped == stored.skipped


def test_a_table_refuses_the_targets_of_other_tasks():
    with pytest.raises(TypeError):
        RegionTable.of([replace(make_regions()[0], target=object())])


# --- Ranks and packing ---------------------------------------------------------------------------


def test_ranks_of_a_machine_share_its_workers(monkeypatch):
    for ranks, workers, share in ((1, 8, 8), (8, 8, 1), (3, 8, 2), (8, 2, 1), (4, 0, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert share_of(workers) == share


def test_one_process_answers_alone():
    assert on_first(SimpleNamespace(num_processes=1), lambda: "stored") == "stored"


def test_archives_have_the_bytes_of_webdatasets():
    files = {"a.json": b"{}", "a.tokens.npy": bytes(1024), "b.json": b"x" * 5000}
    files |= {"b.tokens.npy": b"", "segmentation-00000017.json": bytes(range(256)) * 77}
    ours, theirs = io.BytesIO(), io.BytesIO()
    archive = _Archive(ours)
    places = {name: archive.add(name, content) for name, content in files.items()}
    archive.close()
    with webdataset.TarWriter(theirs, user="", group="", encoder=False, mtime=0) as writer:
        for name, content in files.items():
            key, _, ending = name.partition(".")
            writer.write({"__key__": key, ending: content})
    assert ours.getvalue() == theirs.getvalue()
    ours.seek(0)
    with tarfile.open(fileobj=ours) as opened:
        assert {m.name: (m.offset_data, m.size) for m in opened} == places


def test_a_caption_that_fits_by_its_length_fits():
    text = TextTokenizer(1000)
    vocabulary = Vocabulary(text_merges=1000)
    codec = SequenceCodec(SequenceFormat(vocabulary, codes_per_image=36), text)
    fits = {True: 0, False: 0}
    for length in range(60):
        for word in ("dog ", "ü", "日本", "zq"):
            caption = (word * 60)[:length].strip()
            try:
                write_caption(codec, CaptionText("hot dog", (0.0, 0.0, 1.0, 1.0), caption))
            except TooLongError:
                assert longest_caption(codec, "hot dog", caption) > 36
                fits[False] += 1
            else:
                fits[longest_caption(codec, "hot dog", caption) <= 36] += 1
    assert min(fits.values()) > 10
