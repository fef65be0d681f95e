"""Where the pictures of episodes are looked for, if several folders have files of equal names."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import ExifTags, Image, ImageColor

from icl_moe.errors import InputError
from icl_moe.evaluation.photographs import Photographs

COLOURS = {"queries": "red", "examples": "lime", "synthetic": "blue", "composed": "white"}


@pytest.fixture
def shown(tmp_path):
    """(recipe, task, sources of the pairs) -> the colour of the picture of each pair. All folders
    have a file 1.png.
    """
    for name, colour in COLOURS.items():
        folder = tmp_path / name / ("images" if name in ("synthetic", "composed") else "")
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / "1.png")

    def show(recipe, task, *sources, images: Path | None = None) -> list[str]:
        manifest = SimpleNamespace(recipe={"tasks": {}, **recipe}, image_size=8)
        shards = SimpleNamespace(location=str(tmp_path), manifest=manifest)
        photographs = Photographs(shards, task, images)
        whole = {"image": "1.png", "crop": [0, 0, 8, 8]}
        meta = {"sources": [whole | source for source in sources]}
        episode = SimpleNamespace(key="key", meta=meta)
        colours = [_colour(photographs.show(episode, n)) for n in range(len(sources))]
        assert _colour(photographs.show(episode, -1)) == colours[-1]
        return colours

    return show


def _colour(picture: Image.Image) -> str:
    (colour,) = [
        colour
        for colour in COLOURS.values()
        if ImageColor.getrgb(colour) == picture.getpixel((4, 4))
    ]
    return colour


def test_examples_and_queries_are_from_folders_of_their_own(shown, tmp_path):
    section = {
        "images": str(tmp_path / "queries"),
        "examples_images": str(tmp_path / "examples"),
    }
    recipe = {"segmentation": section}
    for task in ("segmentation", "semantic_segmentation"):
        assert shown(recipe, task, {}, {}, {}) == ["lime", "lime", "red"]
    named = shown(recipe, "segmentation", {}, {}, images=tmp_path / "synthetic/images")
    assert named == ["blue", "blue"]


def test_drawn_scenes_and_compositions_do_not_stand_in_for_photographs(shown, tmp_path):
    photographs = {"images": str(tmp_path / "queries")}
    recipe = {"segmentation": photographs, "captioning": {"images": None}}
    assert shown(recipe, "segmentation", {"provenance": [1]}, {}) == ["white", "red"]
    assert shown(recipe, "captioning", {}, {}) == ["blue", "blue"]
    of_file = {"episodes_data": str(tmp_path / "examples"), "segmentation": None}
    assert shown(of_file, "segmentation", {}, {}) == ["lime", "lime"]


def test_a_missing_picture_is_named(shown, tmp_path):
    with pytest.raises(InputError, match=r"The image 2\.png of key is not in .*queries; name its"):
        shown(
            {"segmentation": {"images": str(tmp_path / "queries")}},
            "segmentation",
            {"image": "2.png"},
        )


@pytest.mark.parametrize("name", ["../queries/1.png", "link.png"])
def test_a_picture_outside_the_folder_is_not_read(shown, tmp_path, name):
    """Shards of a stranger must not show, in a report, files that are none of their pictures."""
    (tmp_path / "examples/link.png").symlink_to(tmp_path / "queries/1.png")
    recipe = {"segmentation": {"images": str(tmp_path / "examples")}}
    with pytest.raises(InputError, match=r"is not in .*examples|is a link that leads out of"):
        shown(recipe, "segmentation", {"image": name})


def test_a_picture_too_small_for_its_crop_is_refused(shown, tmp_path):
    recipe = {"segmentation": {"images": str(tmp_path / "queries")}}
    with pytest.raises(InputError, match=r"has 8 x 8 pixels, too few for the crop \[0, 0, 9, 8\]"):
        shown(recipe, "segmentation", {"crop": [0, 0, 9, 8]})


def test_a_picture_is_turned_as_its_record_assumes(shown, tmp_path):
    """Annotations may be of the picture as stored or as it is shown; its size tells which."""
    stored = Image.new("RGB", (8, 6), COLOURS["queries"])
    stored.paste(COLOURS["examples"], (0, 0, 4, 6))  # The left half.
    turned = stored.getexif()
    turned[ExifTags.Base.Orientation] = 6  # To be turned by 90 degrees.
    stored.save(tmp_path / "queries/2.png", exif=turned)
    recipe = {"segmentation": {"images": str(tmp_path / "queries")}}
    two = {"image": "2.png", "crop": [0, 0, 5, 5]}
    at_4_4 = {(8, 6): "red", (6, 8): "red"}
    for size in at_4_4:
        assert shown(recipe, "segmentation", two | {"size": [*size]}) == [at_4_4[size]]
    left = two | {"crop": [0, 0, 8, 6], "size": [8, 6]}
    assert shown(recipe, "segmentation", left) == ["red"]
    with pytest.raises(InputError, match="has 6 x 8 pixels, not 9 x 9"):
        shown(recipe, "segmentation", two | {"size": [9, 9]})
