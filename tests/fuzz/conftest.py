import json
from pathlib import Path

import pytest
import toy_export
import toy_tokenizer
from PIL import Image

from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What is mutated: drawn data in COCO's and Visual Genome's files, shards of it, a model, and a
    region, an image and a mask.
    """
    folder = tmp_path_factory.mktemp("material")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = ["synthetic.images=16", "samples=6", *toy_tokenizer.recipe_settings(tokenizer)]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    (folder / "shards/synthetic").rename(folder / "data")
    toy_export.save_toy_model(folder / "model", folder / "shards")
    region = {"caption": "a red thing", "category": "thing", "box": [1, 2, 30, 40]}
    (folder / "region.json").write_text(json.dumps(region))
    picture = Image.radial_gradient("L").resize((64, 48))
    Image.merge("RGB", [picture] * 3).save(folder / "image.jpg")
    picture.point(lambda level: 255 * (level < 99)).save(folder / "mask.png")
    return folder
