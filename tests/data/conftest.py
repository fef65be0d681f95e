from pathlib import Path

import pytest
import toy_tokenizer

from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small shards per task of drawn scenes, encoded by a tokenizer with random weights."""
    out = tmp_path_factory.mktemp("shards") / "demo"
    tokenizer = toy_tokenizer.save_toy_tokenizer(out.parent / "tokenizer")
    settings = [
        "synthetic.images=40",
        "samples=25",
        "shard_size=10",
        "examples=2",
        *toy_tokenizer.recipe_settings(tokenizer),
    ]
    build_shards(load_recipe(DataRecipe, "demo", settings, package="preprocessing"), out, workers=0)
    return out
