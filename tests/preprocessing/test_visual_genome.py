"""Visual Genome's regions get the class of an object with that name and place, and errors in files
are reported.
"""

import json

import pytest

from icl_moe.errors import InputError
from icl_moe.inputs import read_json
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource
from preprocessing.visual_genome import read_captioning, read_json_list


def read(folder, missing_images="stop", **settings) -> Pool:
    settings = {"min_descriptions": 0} | settings
    files = {"regions": "region_descriptions", "objects": "objects", "image_data": "image_data"}
    paths = {key: str(folder.file(name)) for key, name in files.items()}
    return read_captioning(
        CaptioningSource("visual_genome", images=str(folder.images), **paths | settings),
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
    # In each image, one region names a dog where there is no dog, and one names no class.
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


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            ["1", "2"],
            r"'train' has the image id '1', but the ids of .*image_data.json look like 1",
        ),
        (["1.jpg"], r"'train' has the image id '1.jpg'"),
        ([[1], [2]], r"'train' has the image id \[1\]"),
        ([None], "'train' has the image id None"),
        ([1, "2"], "'train' has the image id '2'"),
        ([77, 78], r"none of the 2 images of 'train' is in .*image_data.json"),
        ([], r"none of the 0 images of 'train' is in"),
        ({"1": 1}, "has no list of image ids named 'train'"),
    ],
)
def test_a_split_whose_ids_are_not_those_of_the_images_is_named(
    genome_folder, tmp_path, ids, message
):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ids}))
    with pytest.raises(InputError, match=rf"splits.json.* {message}"):
        read(genome_folder, splits=str(splits), split="train")


def test_held_out_images_keep_the_classes_that_are_frequent_in_training(genome_folder, tmp_path):
    """Dogs have two descriptions in each image: six in `train`, two in `val`."""
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [1, 2, 3], "val": [5]}))
    dogs = dict(splits=str(splits), split="val", classes=("dog",))
    assert not read(genome_folder, **dogs, min_descriptions=5).regions
    kept = read(genome_folder, **dogs, min_descriptions=5, counted_split="train")
    assert {region.image.name for region in kept.regions} == {"VG_100K/5.jpg"}
    assert len(kept.regions) == 2
    alone = read(genome_folder, **dogs, min_descriptions=0)
    assert +kept.skipped == +alone.skipped, "what the other split leaves out is not counted"
    left = read(genome_folder, **dogs, min_descriptions=6, counted_split="train")
    assert not left.regions
    assert left.skipped["classes_with_too_few_descriptions"] == 1


def test_images_of_a_split_that_have_no_record_are_counted(genome_folder, tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [1, 2, 77, 78]}))
    pool = read(genome_folder, splits=str(splits), split="train")
    assert pool.skipped["images_of_the_split_without_a_record"] == 2


def test_names_in_addresses_may_be_quoted(genome_folder):
    (genome_folder.images / "VG_100K/1.jpg").rename(genome_folder.images / "VG_100K/a dog.jpg")
    genome_folder.content["image_data"][0]["url"] = "https://example.org/VG_100K/a%20dog.jpg"
    genome_folder.write()
    assert read(genome_folder).regions[0].image.name == "VG_100K/a dog.jpg"


def region(**values):
    return lambda records: records[0]["regions"][0].update(values)


@pytest.mark.parametrize("size", [{"width": -50}, {"height": -36}, {"width": -1, "height": -1}])
def test_a_region_of_negative_size_is_left_out_and_counted(genome_folder, size):
    region(**size)(genome_folder.content["region_descriptions"])
    genome_folder.write()
    pool = read(genome_folder)
    assert len(pool.regions) == 9
    assert pool.skipped["boxes_of_negative_size"] == 1
    assert pool.skipped["regions_without_a_class"] == 10


def test_an_object_of_negative_size_is_left_out_and_counted(genome_folder):
    genome_folder.content["objects"][0]["objects"][0].update(x=50, w=-50)
    genome_folder.write()
    pool = read(genome_folder)
    assert len(pool.regions) == 9
    assert pool.skipped["boxes_of_negative_size"] == 1
    assert pool.skipped["regions_without_a_class"] == 11


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (region(region_id=12), "regions_with_the_id_of_another"),
        (region(image_id=2), "regions_of_another_image"),
        (region(phrase=None), "regions_without_a_class"),
        (region(phrase=" . "), "regions_without_a_class"),
        (region(width=0), "empty_boxes"),
        (region(x=500), "empty_boxes"),
    ],
)
def test_a_region_that_belongs_nowhere_is_counted(genome_folder, edit, reason):
    edit(genome_folder.content["region_descriptions"])
    genome_folder.write()
    pool = read(genome_folder)
    assert len(pool.regions) == 9
    assert pool.skipped[reason] == 1 + 10 * (reason == "regions_without_a_class")


def test_half_an_emoji_is_replaced(genome_folder):
    region(phrase="the dogs \udc15 sleep")(genome_folder.content["region_descriptions"])
    genome_folder.write()
    assert read(genome_folder).regions[0].target.caption == "the dogs \ufffd sleep"


def test_classes_that_are_asked_for_and_never_seen_are_counted(genome_folder):
    pool = read(genome_folder, classes=("tree", "zebrra"))
    assert pool.skipped["classes_without_a_region"] == 1


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("image_data", "objects", r"image 1 has the size None x None"),
        ("image_data", "region_descriptions", "has a record without 'image_id'"),
        ("objects", "image_data", "has a record without an image's id and its list of objects"),
        ("objects", "region_descriptions", "and its list of objects"),
        ("regions", "objects", "and its list of regions"),
        ("regions", "image_data", "and its list of regions"),
        ("regions", "coco", "is not a list of records"),
        ("regions", "images", "is not a file"),
    ],
)
def test_a_file_under_the_wrong_key_is_named(genome_folder, tmp_path, key, given, message):
    (genome_folder.folder / "coco.json").write_text('{"images": [], "annotations": []}')
    wrong = genome_folder.images if given == "images" else genome_folder.file(given)
    with pytest.raises(InputError, match=rf"{wrong.name}.* {message}"):
        read(genome_folder, **{key: str(wrong)})


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
            "has regions of image 99, which image_data lacks",
        ),
        (
            "objects",
            lambda records: records[0].update(image_id=99),
            "has objects of image 99, which image_data lacks",
        ),
        (
            "region_descriptions",
            lambda records: records[1]["regions"][0].pop("x"),
            r"image 2, region 21 has the box \[None, 0, 50, 36\]; it must be x, y, width and h",
        ),
        (
            "region_descriptions",
            lambda records: records[0]["regions"][0].pop("region_id"),
            "without 'region_id'; it must have the layout of .* 1.2",
        ),
        (
            "objects",
            lambda records: records[0]["objects"][0].pop("names"),
            "without 'names'; it must have the layout of .* 1.2",
        ),
        (
            "image_data",
            lambda records: records[0].pop("image_id"),
            "without 'image_id'; it must have the layout of .* 1.2",
        ),
        ("image_data", lambda records: records[0].update(height=0), "image 1 has the size 100 x 0"),
        ("region_descriptions", region(region_id=None), "without 'region_id'"),
        ("region_descriptions", region(region_id=[1]), "without 'region_id'"),
        ("region_descriptions", region(phrase=7), "image 1, region 11 has no text as its 'phrase'"),
        (
            "region_descriptions",
            lambda records: records[0]["regions"][0].pop("phrase"),
            "image 1, region 11 has no text as its 'phrase'",
        ),
        (
            "region_descriptions",
            region(x="0"),
            r"image 1, region 11 has the box \['0', 0, 50, 36\]; it must be x, y, width and h",
        ),
        ("region_descriptions", region(width=float("nan")), "image 1, region 11 has the box"),
        ("region_descriptions", region(width=10**400), "image 1, region 11 has the box"),
        (
            "region_descriptions",
            lambda records: records[0]["regions"].append(None),
            "image 1 has a region without 'region_id'",
        ),
        (
            "region_descriptions",
            lambda records: records[0].update(regions=None),
            "has a record without an image's id and its list of regions",
        ),
        (
            "region_descriptions",
            lambda records: records[0].update(id="1"),
            r"has regions of image '1', .* \(it is text, and the ids there are numbers\)",
        ),
        (
            "region_descriptions",
            lambda records: records[0].update(id=2),
            "has two records of image 2; each image may have only one record",
        ),
        (
            "objects",
            lambda records: records[0].update(image_id=2),
            "has two records of image 2; each image may have only one record",
        ),
        (
            "objects",
            lambda records: records[0]["objects"][0].update(h=None),
            r"image 1, object 10 has the box \[0, 0, 50, None\]",
        ),
        ("objects", lambda records: records[0]["objects"].append("dog"), "without 'names'"),
        (
            "objects",
            lambda records: records[0]["objects"][0].update(names="dog"),
            "without 'names'",
        ),
        (
            "image_data",
            lambda records: records[0].update(image_id=2),
            "image 2 occurs twice",
        ),
        (
            "image_data",
            lambda records: records[0].update(url=records[1]["url"]),
            "image 2 has the file name VG_100K/2.jpg of image 1",
        ),
        ("image_data", lambda records: records[0].update(image_id=None), "without 'image_id'"),
        ("image_data", lambda records: records[0].update(image_id=[1]), "without 'image_id'"),
        ("image_data", lambda records: records[0].update(url=["x"]), "image 1 has the url"),
        (
            "image_data",
            lambda records: records[0].update(url="https://example.org/.."),
            "image 1 has the file name '..'",
        ),
        (
            "image_data",
            lambda records: records[0].update(url="https://example.org/%2Fetc%2Fpasswd"),
            "image 1 has the file name '/etc/passwd'",
        ),
        (
            "image_data",
            lambda records: records[0].update(url="https://example.org/%00.jpg"),
            "image 1 has the file name",
        ),
        ("image_data", lambda records: records[0].update(width="100"), "has the size '100' x 80"),
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
        ("[1, " + "9" * 5000 + "]", "a number with too many digits"),
        ("[" * 100_000, "nested too deep"),
        ('[{"a": {"b": 1, "b": 2}}]', "the key 'b' occurs twice in one record"),
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
