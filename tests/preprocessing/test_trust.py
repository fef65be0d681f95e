"""`icl-moe shards verify` holds samples against their sources, `stats` draws what a folder holds,
and neither overlooks what is wrong.
"""

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer
from conftest import CocoFolder, write_image
from PIL import Image

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.settings import load_recipe
from preprocessing import cli, quantize
from preprocessing.build import build_shards
from preprocessing.compare import compare_with_sources
from preprocessing.recipe import CaptioningSource, DataRecipe, SegmentationSource
from preprocessing.stats import shard_stats


def shards(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.run(parser.parse_args(["shards", *map(str, arguments)]))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> CocoFolder:
    return CocoFolder(tmp_path_factory.mktemp("source") / "coco")


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """Shards of both tasks, from COCO's format."""
    folder = tmp_path_factory.mktemp("built")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = [
        *toy_tokenizer.recipe_settings(tokenizer),
        "segmentation.source=coco",
        f"segmentation.images={source.images}",
        f"segmentation.annotations={source.file}",
        "captioning.source=coco_captions",
        "captioning.classes=[dog, cat]",
        f"captioning.images={source.images}",
        f"captioning.annotations={source.captions_file}",
        f"captioning.instances={source.file}",
    ]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    return folder / "shards"


def test_verify_says_what_it_compared_with_the_sources(built, capsys):
    assert shards("verify", built, "--samples", 4) == 0
    out = capsys.readouterr().out
    assert "samples are complete and correct" in out
    assert "segmentation: 4 samples (8 pairs) made anew from the sources" in out
    assert "captioning: 4 samples (8 pairs) made anew from the sources" in out
    assert "100.00% of the codes of pictures" in out
    assert "masks decoded from tokens have a mean IoU of" in out


@pytest.fixture
def changed(source, built) -> CocoFolder:
    """The sources, which a test may change; they are restored after it."""
    keep = source.folder.with_name("keep")
    shutil.copytree(source.folder, keep)
    quantize._open_image.cache_clear()  # Another process, as in use, has opened no image yet.
    yield source
    shutil.rmtree(source.folder)
    keep.rename(source.folder)


def another_picture(source: CocoFolder) -> None:
    pixels = np.random.default_rng(99).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    for number in range(1, 7):
        Image.fromarray(pixels // 2).save(source.images / f"{number}.jpg")


def edited(name: str, edit):
    def change(source: CocoFolder) -> None:
        file = source.folder / name
        content = json.loads(file.read_bytes())
        for annotation in content["annotations"]:
            edit(annotation)
        file.write_text(json.dumps(content))

    return change


def hollow_out(annotation: dict) -> None:
    # The box around the object, which places the part that is shown, does not change.
    if annotation["category_id"] == 18:
        annotation["segmentation"] = [[10, 20, 50, 20, 50, 50, 46, 50, 46, 24, 10, 24]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_picture, r"only \d+% of the codes of a picture .* are those of the sources"),
        (
            edited("instances.json", hollow_out),
            r"the mask of its pair \d has an IoU of|only \d+% of",
        ),
        (
            edited("captions.json", lambda a: a.update(caption=f"{a['caption']} or a cat")),
            r"a text or a box differs|a caption, a class or a box differs",
        ),
        (
            edited("instances.json", lambda a: a.update(id=a["id"] + 100)),
            r"the sources have no region of \w+ in \d.jpg with the annotations \[",
        ),
    ],
)
def test_samples_that_differ_from_their_sources_are_named(built, changed, change, message):
    change(changed)
    with pytest.raises(InputError, match=rf"sample \S+ differs from its sources: .*({message})"):
        compare_with_sources(built, 6, workers=0)


def test_captions_of_which_another_split_is_counted_are_compared(genome_folder, tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [1, 2], "val": [2, 3, 4, 5]}))
    files = [f"{key}={genome_folder.file(key)}" for key in ("objects", "image_data")]
    files.append(f"regions={genome_folder.file('region_descriptions')}")
    keys = [*files, f"images={genome_folder.images}", f"splits={splits}", "split=val"]
    keys += ["source=visual_genome", "counted_split=train", "min_descriptions=1", "classes=[dog]"]
    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
    settings = [*toy_tokenizer.recipe_settings(tokenizer), "segmentation=null"]
    settings += [f"captioning.{key}" for key in keys]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, tmp_path / "shards", workers=0)
    (line,) = compare_with_sources(tmp_path / "shards", 2, workers=0)
    assert line.startswith("captioning: 2 samples (4 pairs) made anew from the sources"), line


def test_images_that_the_build_left_out_are_not_compared(tmp_path):
    """The record of an image without a size is made from its file, which is cut off here."""
    lines = []
    for number in range(5):
        write_image(tmp_path / f"{number}.png", number)
        mask_HW = np.zeros((80, 100), dtype=np.uint8)
        mask_HW[10:50, 20:70] = 255
        Image.fromarray(mask_HW).save(tmp_path / f"{number}_mask.png")
        line = {"image": f"{number}.png", "class": "dog", "mask": f"{number}_mask.png"}
        lines.append(json.dumps(line))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    (tmp_path / "3.png").write_bytes(b"cut off")
    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
    settings = [*toy_tokenizer.recipe_settings(tokenizer), "captioning=null", "bad_images=skip"]
    settings += [f"segmentation.images={tmp_path}", "segmentation.source=jsonl"]
    settings += [f"segmentation.annotations={tmp_path / 'lines.jsonl'}"]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    assert build_shards(recipe, tmp_path / "shards", workers=0).bad_images
    (line,) = compare_with_sources(tmp_path / "shards", 2, workers=0)
    assert line.startswith("segmentation: 2 samples"), line


@pytest.mark.parametrize("source", [SegmentationSource, CaptioningSource])
def test_all_keys_that_name_files_are_known_as_such(source):
    """A key of text is a file, unless it is known to name a list in one."""
    texts = {each.name for each in fields(source) if each.type == (str | None)}
    given = source(**dict.fromkeys(texts, "x"))
    assert given.paths().keys() == texts - {"split", "counted_split"}


def test_sources_that_are_gone_are_said_so(built, changed):
    (changed.images / "1.jpg").unlink()
    lines = compare_with_sources(built, 9, workers=0)
    assert "others lack their images) made anew from the sources" in lines[0]
    changed.file.unlink()
    (line,) = compare_with_sources(built, 6, workers=0)
    assert "instances.json does not exist" in line
    assert "not compared" in line


def test_stats_shows_areas_codes_and_what_splits_share(built, capsys, tmp_path):
    assert shards("stats", built, "--against", built, "--plots", tmp_path / "plots") == 0
    out = capsys.readouterr().out
    count = ShardSet(built).count("segmentation")
    lines = [line.split() for line in out.splitlines()]
    areas = [int(line[-1]) for line in lines if line[1:2] == ["to"] and line[0].endswith("%")]
    assert sum(areas[:6]) == 2 * count
    assert "image codes of segmentation, in" in out
    assert ["classes", "of", "segmentation", "0", "2", "0"] in lines
    assert ["images", "of", "segmentation", "0", "6", "0"] in lines
    plots = sorted((tmp_path / "plots").iterdir())
    assert {plot.name for plot in plots} >= {
        "segmentation_samples.png",
        "captioning_lengths.png",
        "segmentation_areas.png",
        "segmentation_image_codes.png",
        "overlap_0.png",
    }
    for plot in plots:
        with Image.open(plot) as image:
            assert image.width == 920
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_the_preview_shows_the_sources_while_they_are_there(built, changed, tmp_path, monkeypatch):
    # Other images of these names are none of the sources.
    monkeypatch.chdir(shutil.copytree(changed.images, tmp_path / "here"))
    for images in (2, 0):
        page = tmp_path / f"{images}.html"
        assert shards("preview", built, "--out", page) == 0
        samples = min(12, ShardSet(built).count("segmentation")) + 12
        assert page.read_text().count("<b>source</b>") == images * samples
        shutil.rmtree(changed.images, ignore_errors=True)


def test_splits_without_a_common_task_are_refused(built, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(built, other)
    manifest = json.loads((other / "manifest.json").read_bytes())
    for key in ("samples", "classes"):
        del manifest[key]["segmentation"], manifest[key]["captioning"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has no task of"):
        shard_stats(built, [other])
