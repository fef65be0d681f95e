"""A small version of the demo's shards, built with the toy tokenizer, and the hashes of shards."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import toy_tokenizer

from icl_moe.data.shards import Manifest
from icl_moe.settings import load_recipe
from preprocessing.pool import Pool
from preprocessing.recipe import DataRecipe

SMALL = ["synthetic.images=40", "samples=25", "shard_size=10"]

Build = Callable[..., Manifest]


def small_recipe(tokenizer: Path, *settings: str, recipe: str = "demo") -> DataRecipe:
    overrides = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer), *settings]
    return load_recipe(DataRecipe, recipe, overrides, package="preprocessing")


def regions_of_classes(pool: Pool) -> dict[str, int]:
    """How many regions a pool has of each class, in alphabetical order."""
    return dict(sorted(Counter(region.category for region in pool.regions).items()))


def hashes(folder: Path) -> dict[str, str]:
    names = ("*.tar", "*.index.npy", "manifest.json")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for path in folder.glob(name)
    }
