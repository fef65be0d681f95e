"""A small exported model with random weights that fits a shard folder, for tests of inference and
evaluation.
"""

import shutil
from pathlib import Path

import torch
import toy_tokenizer

from icl_moe.data.shards import Manifest
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings
from icl_moe.settings import load_recipe, to_dict
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe


def build_toy_line(folder: Path, images: int = 12, samples: int = 2, *others: str) -> Path:
    """Write a tokenizer, shards of drawn scenes in its codes, and a model for these into `folder`.
    Returns the model's folder, `folder/model`. others: further settings of the data recipe.
    """
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = (f"synthetic.images={images}", f"samples={samples}", *others)
    recipe = load_recipe(
        DataRecipe,
        "demo",
        [*settings, *toy_tokenizer.recipe_settings(tokenizer)],
        package="preprocessing",
    )
    build_shards(recipe, folder / "shards", workers=0)
    return save_toy_model(folder / "model", folder / "shards")


def save_toy_model(folder: Path, shards: Path, seed: int = 0, **config: object) -> Path:
    """Write a model of two layers for the episodes of `shards` into `folder`, as `icl-moe export`
    would.
    """
    manifest = Manifest.read(shards)
    positions = manifest.format.length(manifest.examples + 1)
    settings = ModelSettings(
        layers=2, width=32, heads=2, positions=positions, layers_with_experts=(1,), experts=4
    )
    decoder = InContextDecoder(
        DecoderConfig(
            model=to_dict(settings),
            vocabulary=to_dict(manifest.format.vocabulary),
            **manifest.of_model,
            **config,
        )
    )
    initialise(decoder, seed)
    with torch.no_grad():  # As large as after training, so that the output depends on the input.
        for parameter in decoder.parameters():
            parameter.mul_(4.0)
    decoder.save_pretrained(folder)
    for name in manifest.tokenizer_folders:
        shutil.copytree(shards / name, folder / name)
    return folder
