"""What can be refused before any rank starts: it imports neither torch's engine nor the model, so it answers at once."""

import json
from pathlib import Path
from typing import Any

from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe, to_dict

# Keys of a DeepSpeed configuration that follow from the recipe; an engine file must leave them out.
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "steps_per_print",
)


def check(recipe: TrainingRecipe, world: int) -> tuple[ShardSet, dict[str, Any]]:
    """The shards and the engine file of a recipe that can run on `world` ranks.

    Raises InputError, before any rank starts, for shards that are missing or of another vocabulary, positions that do not suffice,
    batches that do not divide, and layouts that are not supported.
    """
    folder = Path(recipe.data.shards)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"data.shards: there are no shards in {folder}; build them with `icl-moe shards build`, or set data.shards=DIR.")
    shards = ShardSet(folder)
    _check_shards(recipe, shards.manifest)
    _check_layout(recipe, world)
    RankSlice.of(0, world, recipe.training.global_batch, recipe.training.micro_batch)
    Schedule(shards.manifest.samples, recipe.training.global_batch, recipe.training.seed, recipe.training.sampling)
    return shards, read_engine(recipe.engine)


def read_engine(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration `name`: a path, or a file of ds_configs without its .json."""
    candidates = [Path(name), Path("ds_configs") / f"{name}.json", Path(__file__).parents[2] / "ds_configs" / f"{name}.json"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(f"engine: there is no file {name} and no ds_configs/{name}.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"engine: {path} is not valid JSON ({error}).") from error
    for key in _RECIPE_KEYS:
        if key in config:
            raise InputError(f"engine: {path} sets '{key}', which follows from the recipe; leave it out.")
    return config


def _check_shards(recipe: TrainingRecipe, manifest: Manifest) -> None:
    theirs, ours = manifest.format.vocabulary, recipe.vocabulary
    if theirs != ours:
        raise InputError(
            f"data.shards: {recipe.data.shards} was built for a vocabulary of {theirs.size} ids ({to_dict(theirs)}), "
            f"the recipe's has {ours.size} ({to_dict(ours)}); make them equal."
        )
    needed = manifest.format.length(manifest.examples + 1)
    if needed > recipe.model.positions:
        raise InputError(f"model.positions is {recipe.model.positions}, but the sequences of {recipe.data.shards} take {needed} positions.")


def _check_layout(recipe: TrainingRecipe, world: int) -> None:
    ep_size = recipe.parallel.ep_size
    if recipe.parallel.tp_size != 1:
        raise InputError(f"parallel.tp_size must be 1, not {recipe.parallel.tp_size}: tensor parallelism is not there yet.")
    if ep_size > 1 and recipe.model.combination == "weights":
        raise InputError(f"parallel.ep_size must be 1 with model.combination=weights, not {ep_size}: a rank must hold all that it merges.")
    if world % ep_size or recipe.model.experts % ep_size:
        raise InputError(
            f"parallel.ep_size ({ep_size}) must divide model.experts ({recipe.model.experts}) and the number of ranks ({world})."
        )
