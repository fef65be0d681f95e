"""Every row of every table of the paper trains, at both scales: one step at tiny size, on shards
that its own data recipe builds from drawn scenes.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import toy_tokenizer
from reproduce.test_paper_tables import RUNS

from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.tables import Shards
from icl_moe.settings import load_recipe
from icl_moe.training import trainer
from icl_moe.training.preflight import open_checked
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe

SMALL_DATA = ("synthetic.images=24", "samples=4", "shard_size=4")
SHAPES = "synthetic.images=100"
"""Enough that four scenes show a class by no small object."""

SMALL_STEP = (
    "training.steps=1",
    "training.global_batch=4",
    "training.micro_batch=4",
    "training.dry_run=false",
    "data.workers=0",
)
DRAWN = (
    "image_size=64",
    "vocabulary.text_merges=1000",
    "segmentation.source=synthetic",
    "captioning.source=synthetic",
    "captioning.min_descriptions=0",
    "captioning.classes=[square, disc, star, ring]",
)
SMALL_MODEL = (
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.layers_with_experts=[1]",
    "vocabulary.text_merges=1000",
    f"vocabulary.image_codes={toy_tokenizer.CODES}",
    "engine=zero0_fp32",
)


def one_step_each(place: Any, runs: dict[str, tuple[str, list[str]]]) -> dict[str, int]:
    """Train each run on this rank, and return the steps that it has done."""
    done = {}
    build = trainer.TrainingEngine.__init__
    for name, (recipe_name, settings) in runs.items():
        engines: list[Any] = []

        def keep(engine: Any, *args: Any, engines: list[Any] = engines) -> None:
            build(engine, *args)
            engines.append(engine)

        recipe = load_recipe(TrainingRecipe, recipe_name, settings)
        with mock.patch.object(trainer.TrainingEngine, "__init__", keep):
            run = trainer.Trainer(recipe, open_checked(recipe, place.world))
            done[name] = run.fit_on(place).step
        engines[0].deepspeed.destroy()
    return done


@pytest.mark.parametrize("scale", ["demo", pytest.param("paper", marks=pytest.mark.slow)])
def test_every_row_of_every_table_trains_for_a_step(scale, tmp_path, rank_group):
    drawn: tuple[str, ...] = ()
    if scale == "paper":
        tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
        drawn = (*DRAWN, *toy_tokenizer.recipe_settings(tokenizer))
    runs = {name: run for (scale_of, name), run in RUNS.items() if scale_of == scale}
    folders = _build_all({run.trained for run in runs.values()}, drawn, tmp_path / "shards")
    small = SMALL_STEP + (SMALL_MODEL if scale == "paper" else ())
    started = {
        name: (
            run.recipe,
            [
                f"data.shards={folders[run.trained]}",
                f"training.output={tmp_path / name}",
                *run.settings,
                *small,
            ],
        )
        for name, run in runs.items()
    }
    (done,) = rank_group(1).run(one_step_each, started)
    assert done == dict.fromkeys(runs, 1)


def _build_all(needed: set[Shards], drawn: tuple[str, ...], folder: Path) -> dict[Shards, Path]:
    """The folder of each; those whose sequences look alike share one."""
    built: dict[Any, Path] = {}
    folders = {}
    for shards in sorted(needed, key=lambda each: each.name):
        # The settings of drawn scenes come first: a task that the row leaves out stays out.
        settings = [*drawn, *shards.settings, *SMALL_DATA]
        if shards.recipe == "modern_demo" and "synthetic.world=shapes" not in settings:
            settings.append("synthetic.classes=8")  # Each is seen in several of so few scenes.
        else:
            settings.append(SHAPES)
        recipe = load_recipe(DataRecipe, shards.recipe, settings, package="preprocessing")
        tasks = recipe.segmentation is not None, recipe.captioning is not None
        like = recipe.sequence_format(64), recipe.examples, tasks
        if like not in built:
            built[like] = folder / shards.name
            build_shards(recipe, built[like], workers=0)
        folders[shards] = built[like]
    return folders
