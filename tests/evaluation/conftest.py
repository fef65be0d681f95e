from pathlib import Path

import pytest
import toy_export
import toy_tokenizer

from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory) -> Path:
    """Eleven drawn episodes per task with two examples each and class prompts, for evaluation with
    0 to 2 examples.
    """
    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    settings = [
        "synthetic.images=40",
        "samples=11",
        "examples=2",
        "class_prompt=true",
        "vocabulary.mask=true",
        *toy_tokenizer.recipe_settings(tokenizer),
    ]
    folder = tmp_path_factory.mktemp("shards") / "toy"
    build_shards(
        load_recipe(DataRecipe, "demo", settings, package="preprocessing"), folder, workers=0
    )
    return folder


@pytest.fixture(scope="session")
def toy_model_folder(tmp_path_factory, toy_shards) -> Path:
    return toy_export.save_toy_model(tmp_path_factory.mktemp("model"), toy_shards)


@pytest.fixture(scope="session")
def parallel_model_folder(tmp_path_factory, toy_shards) -> Path:
    """A copy of the toy model that is marked as trained with mask corruption."""
    folder = tmp_path_factory.mktemp("parallel_model")
    return toy_export.save_toy_model(folder, toy_shards, mask_corruption=True)
