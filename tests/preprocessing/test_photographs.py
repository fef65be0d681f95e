"""The recipes for photographs, from annotations to a report, with the commands that a user types, a
small backbone and few codes.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import toy_export
import toy_features

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.inference.hub import find_model
from icl_moe.model.config import DecoderConfig
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.tokenizers.masks import PatchTokenizer
from preprocessing.recipe import DataRecipe


@pytest.fixture
def settings(coco_folder, tmp_path) -> list[str]:
    """Makes both tokenizers; the settings with which the recipes use them."""
    reader, masks = tmp_path / "reader", tmp_path / "masks"
    backbone = toy_features.save_toy_backbone(tmp_path / "backbone")
    command = ["tokenizer", "features", coco_folder.images, "--backbone", backbone, "--out", reader]
    command += ["--strides", "8,16", "--image-size", 64, "--downsampling", 8]
    command += ["--codes", toy_features.CODES, "--dimensions", toy_features.DIMENSIONS]
    command += ["--stages", 2]
    run(*command)
    command = ["tokenizer", "masks", coco_folder.file, "--image-size", 64, "--cell", 8]
    run(*command, "--codes", 4, "--out", masks)
    tokenizer = PatchTokenizer.from_pretrained(masks)
    assert (tokenizer.codes, tokenizer.side) == (4, 8)
    return [
        *(f"features_tokenizer={reader}", f"mask_tokenizer={masks}", "image_size=64"),
        *("vocabulary.image_codes=4", *toy_features.vocabulary_settings(stages=2)),
    ]


def run(*command: object) -> None:
    assert main([str(part) for part in command]) == 0


def of_folder(folder: Path, kind: str = "") -> list[str]:
    return [
        f"segmentation.{kind}images={folder / 'images'}",
        f"segmentation.{kind}annotations={folder / 'instances.json'}",
    ]


def test_the_recipes_for_photographs_make_shards_that_a_model_and_a_matcher_are_asked_on(
    coco_folder, settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    training = shutil.copytree(coco_folder.folder, tmp_path / "training")
    build = ["shards", "build", "modern_coco", *settings, *of_folder(training), "samples=8"]
    build += ["segmentation.composed.images=12", "segmentation.composed.same_instance=0"]
    build += ["--workers", 0, "--out", tmp_path / "train"]
    run(*build)
    build = ["shards", "build", "modern_coco_val", *settings, *of_folder(coco_folder.folder)]
    run(*build, *of_folder(training, "examples_"), "--workers", 0, "--out", tmp_path / "val")
    model = toy_export.save_toy_model(tmp_path / "model", tmp_path / "train")
    run("evaluate", model, tmp_path / "val", "--out", tmp_path / "report")

    val = ShardSet(tmp_path / "val")
    names = {"cat": set(), "dog": set()}
    for number in range(val.count("segmentation")):
        sample = val.sample("segmentation", number)
        names[sample.category].add(sample.meta["sources"][-1]["image"])
    assert names["dog"] == {f"{number}.jpg" for number in range(1, 7)} and len(names["cat"]) >= 3
    result = json.loads((tmp_path / "report/metrics.json").read_text())["tasks"]["segmentation"]
    systems = [row["prediction"] for row in result["rows"]]
    assert {"model", "first example", "matcher", "every object", "tokenizer"} <= set(systems)
    assert {row["prediction"] for row in result["swapped"]} >= {"model", "matcher"}


def test_the_recipes_for_photographs_describe_the_shipped_model():
    """So its users can build shards that it reads, and train it further."""
    config = DecoderConfig.from_pretrained(find_model("photographs"))
    for name in ("modern_coco", "modern_coco_val", "own_photographs"):
        recipe = load_recipe(DataRecipe, name, package="preprocessing")
        assert recipe.vocabulary == config.token_vocabulary, name
    recipe = load_recipe(TrainingRecipe, "modern_coco")
    assert (recipe.vocabulary, recipe.model) == (config.token_vocabulary, config.settings)
