"""Visual Genome's regions get a class from an object of that name and place, and wrong files are
named.
"""

import json

import pytest

from icl_moe.errors import InputError
from icl_moe.files import read_json
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource
from preprocessing.visual_genome import read_captioning, read_json_list


def read(folder, missing_images="stop", **settings) -> Pool:
    settings = {"min_descriptions": 0} | settings
    files = {"regions": "region_descriptions", "objects": "objects", "image_data": "image_data"}
    paths = {key: str(folder.file(name)) for key, name in files.items()}
    return read_captioning(
        CaptioningSource("visual_genome", images=str(folder.images), **paths, **settings),
        ImageCheck(missing_images, "stop", folder.folder / "notes"),
    )


def test_a_region_has_the_class_that_its_phrase_names_and_an_object_at_its_place_has(genome_folder):
    pool = read(genome_folder)
    assert [region.category for region in pool.regions] == ["dog"] * 10
    first, second = pool.regions[:2]
    assert first.target.caption == "the dogs are asleep"
    assert first.target.references == ("the dogs are asleep",)
    assert first.target.box == (0.0, 0.0, 0.5, 0.45)
    assert first.annotations == (11,)
    assert first.crop == (0, 0, 100, 80)
    assert first.scale == pytest.approx(0.225)
    assert second.target.caption == "a dog past the edge"
    # Of each image, one region names a dog where there is none, and one names no class.
    assert pool.skipped["regions_without_a_class"] == 10


def test_a_box_past_the_images_edge_is_cut(genome_folder):
    assert read(genome_folder).regions[1].target.box == (0.6, 0.5, 1.0, 1.0)


def test_classes_need_more_descriptions_than_the_least(genome_folder):
    assert len(read(genome_folder, min_descriptions=9).regions) == 10
    pool = read(genome_folder, min_descriptions=10)
    assert pool.regions == []
    assert pool.skipped["classes_with_too_few_descriptions"] == 1


def test_other_classes_than_cocos_can_be_named(genome_folder):
    assert {region.category for region in read(genome_folder, classes=("tree",)).regions} == {
        "tree"
    }


def test_a_split_chooses_images(genome_folder, tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [1, 2, 3], "test": [5]}))
    assert {
        region.image.name
        for region in read(genome_folder, splits=str(splits), split="test").regions
    } == {"VG_100K/5.jpg"}
    with pytest.raises(InputError, match="no list of image ids named 'val'"):
        read(genome_folder, splits=str(splits), split="val")


def test_images_may_lie_in_the_folder_itself(genome_folder):
    for path in (genome_folder.images / "VG_100K").iterdir():
        path.rename(genome_folder.images / path.name)
    assert read(genome_folder).regions[0].image.name == "1.jpg"


def test_missing_images_stop_with_their_count_or_are_skipped_and_counted(genome_folder):
    (genome_folder.images / "VG_100K/2.jpg").unlink()
    with pytest.raises(InputError, match="1 of 5 annotated images are missing"):
        read(genome_folder)
    pool = read(genome_folder, missing_images="skip")
    assert len(pool.regions) == 8
    assert pool.skipped["missing_images"] == 1


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "region_descriptions",
            lambda records: records[0].update(id=99),
            "has regions of image 99, which image_data does not know",
        ),
        (
            "objects",
            lambda records: records[0].update(image_id=99),
            "has objects of image 99, which image_data does not know",
        ),
        (
            "region_descriptions",
            lambda records: records[1]["regions"][0].pop("x"),
            r"image 2, region 21 has the box \[None, 0, 50, 36\]; x, y, width and height",
        ),
        (
            "region_descriptions",
            lambda records: records[0]["regions"][0].pop("region_id"),
            "without 'region_id': the layout of .* 1.2",
        ),
        (
            "objects",
            lambda records: records[0]["objects"][0].pop("names"),
            "without 'names': the layout of .* 1.2",
        ),
        (
            "image_data",
            lambda records: records[0].pop("image_id"),
            "without 'image_id': the layout of .* 1.2",
        ),
        ("image_data", lambda records: records[0].update(height=0), "image 1 has the size 100 x 0"),
        (
            "objects",
            lambda records: records.append(3),
            "has a record without an image's id and its list of objects",
        ),
    ],
)
def test_a_wrong_record_is_named_in_a_sentence(genome_folder, file, edit, message):
    edit(genome_folder.content[file])
    genome_folder.write()
    with pytest.raises(InputError, match=message):
        read(genome_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{}", "is not a list of records"),
        ("nonsense", "is not a list of records"),
        ('[{"a": 1},', "is not valid JSON, a list of records, after its entry 1"),
        ('[{"a": 1}, {"b": }]', "is not valid JSON, a list of records, after its entry 1"),
        ("[1 2", "is not valid JSON, a list of records, after its entry 2"),
        ("[1] [2]", "something follows after the list of 1 records"),
        ("[1]]", "something follows after the list of 1 records"),
        ("[1, " + "9" * 5000 + "]", "a number of too many digits"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_list_that_is_malformed_or_cut_off_is_refused(tmp_path, text, message):
    file = tmp_path / "list.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"list.json .*{message}"):
        list(read_json_list(file))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, encoding):
    file = tmp_path / "list.json"
    file.write_text(' ["ä"] \n', encoding=encoding)
    assert list(read_json_list(file)) == ["ä"] == read_json(file)
    file.write_bytes("ä".encode("latin-1"))
    for read_file in (read_json, lambda file: list(read_json_list(file))):
        with pytest.raises(InputError, match="it is not text in UTF-8"):
            read_file(file)


def test_a_list_is_read_whole_across_the_borders_of_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.visual_genome._READ_CHARACTERS", 7)
    entries = [{"text": "ä" * n, "numbers": [n, -1.5e-3, None]} for n in range(20)]
    file = tmp_path / "list.json"
    for indent in (None, 2):
        file.write_text(json.dumps(entries, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert list(read_json_list(file)) == entries
    file.write_text(" [ ] ")
    assert list(read_json_list(file)) == []


def test_a_missing_file_is_named(genome_folder):
    genome_folder.file("objects").unlink()
    with pytest.raises(InputError, match=r"objects.json does not exist"):
        read(genome_folder)
