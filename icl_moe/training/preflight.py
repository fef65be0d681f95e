"""What can be refused before any rank starts: it imports neither torch's engine nor the model, so
it answers at once.
"""

import json
from pathlib import Path
from typing import Any

from icl_moe.data.location import make_cache
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.outputs import output_folder
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

    Raises InputError, before any rank starts, for an output that cannot be written, shards that are
    missing or of another vocabulary or tokenizer, positions that do not suffice, validation shards
    of another kind, batches that do not divide, layouts that are not supported, and precision that
    the device lacks.
    """
    _check_output(recipe.training.output)
    shards = _open(recipe, "shards", recipe.data.shards)
    _check_shards(recipe, shards.manifest)
    if recipe.training.evaluate_every is not None:
        _check_validation(recipe, shards.manifest, open_validation(recipe).manifest)
    _check_earlier_run(recipe, shards.manifest)
    engine_config = read_engine(recipe.engine)
    _check_layout(recipe, world, zero_stage(engine_config))
    _check_precision(recipe, engine_config)
    RankSlice.of(
        0, world, recipe.training.global_batch, recipe.training.micro_batch, recipe.parallel.tp_size
    )
    make_schedule(recipe, shards.manifest)
    return shards, engine_config


def _check_output(output: str) -> None:
    try:
        folder = output_folder(output)
    except InputError as error:
        raise InputError(f"training.output: {error}") from error
    if folder != Path(output):
        raise InputError(f"training.output: write {folder} instead of {output}; a shell knows ~.")


def make_schedule(recipe: TrainingRecipe, manifest: Manifest) -> Schedule:
    """The order in which a run of this recipe takes the samples. Raises InputError where it
    cannot.
    """
    settings = recipe.training
    return Schedule(
        manifest.samples,
        settings.global_batch,
        settings.seed,
        settings.sampling,
        settings.task_weights,
    )


def open_validation(recipe: TrainingRecipe) -> ShardSet:
    """The shards of data.validation, which a recipe that evaluates while it trains has."""
    assert recipe.data.validation is not None
    return _open(recipe, "validation", recipe.data.validation)


def read_engine(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration `name`: a path, or a file of ds_configs without its .json."""
    candidates = [
        Path(name),
        Path("ds_configs") / f"{name}.json",
        Path(__file__).parents[2] / "ds_configs" / f"{name}.json",
    ]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(f"engine: there is no file {name} and no ds_configs/{name}.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"engine: {path} is not valid JSON ({error}).") from error
    for key in _RECIPE_KEYS:
        if key in config:
            raise InputError(
                f"engine: {path} sets '{key}', which follows from the recipe; leave it out."
            )
    return config


def zero_stage(engine_config: dict[str, Any]) -> int:
    """The ZeRO stage that an engine file asks for."""
    return int(engine_config.get("zero_optimization", {}).get("stage", 0))


def _open(recipe: TrainingRecipe, key: str, location: str) -> ShardSet:
    try:
        return ShardSet(location, make_cache(recipe.data.cache, recipe.data.cache_gigabytes))
    except InputError as error:
        raise InputError(f"data.{key}: {error}") from error


def _check_shards(recipe: TrainingRecipe, manifest: Manifest) -> None:
    theirs, ours = manifest.format.vocabulary, recipe.vocabulary
    if theirs != ours:
        raise InputError(
            f"data.shards: {recipe.data.shards} was built for a vocabulary of {theirs.size} ids "
            f"({to_dict(theirs)}), "
            f"the recipe's has {ours.size} ({to_dict(ours)}); make them equal."
        )
    needed = manifest.format.length(manifest.examples + 1)
    if needed > recipe.model.positions:
        raise InputError(
            f"model.positions is {recipe.model.positions}, but the sequences of "
            f"{recipe.data.shards} take {needed} positions."
        )


def _check_validation(recipe: TrainingRecipe, training: Manifest, validation: Manifest) -> None:
    for name in ("format", "image_size", "image_tokenizer", "text_tokenizer"):
        ours, theirs = getattr(training, name), getattr(validation, name)
        if ours != theirs:
            raise InputError(
                f"data.validation: {recipe.data.validation} has {name.replace('_', ' ')} {theirs}, "
                f"but {recipe.data.shards} has {ours}; "
                "build both alike."
            )
    if validation.examples > training.examples:
        raise InputError(
            f"data.validation: {recipe.data.validation} has {validation.examples} examples an "
            f"episode, more than the {training.examples} "
            f"of {recipe.data.shards}; build it with at most as many."
        )


def _check_earlier_run(recipe: TrainingRecipe, manifest: Manifest) -> None:
    """Codes mean what their tokenizer makes of them: a run cannot go on with those of another."""
    path = Path(recipe.training.output) / "model" / "config.json"
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8")).get("image_tokenizer")
        if theirs != manifest.image_tokenizer:
            raise InputError(
                f"training.output: the run in {recipe.training.output} was on codes of the image "
                f"tokenizer {theirs}, "
                f"but {recipe.data.shards} holds those of {manifest.image_tokenizer}; set it to a "
                "new folder."
            )


def _check_layout(recipe: TrainingRecipe, world: int, stage: int) -> None:
    ep_size, tp_size = recipe.parallel.ep_size, recipe.parallel.tp_size
    if ep_size > 1 and recipe.model.combination == "weights":
        raise InputError(
            f"parallel.ep_size must be 1 with model.combination=weights, not {ep_size}: a rank "
            "must hold all that it merges."
        )
    if ep_size < 1 or world % ep_size or recipe.model.experts % ep_size:
        raise InputError(
            f"parallel.ep_size ({ep_size}) must divide model.experts ({recipe.model.experts}) and "
            f"the number of ranks ({world})."
        )
    if tp_size < 1 or world % tp_size or recipe.model.heads % tp_size:
        raise InputError(
            f"parallel.tp_size ({tp_size}) must divide model.heads ({recipe.model.heads}) and the "
            f"number of ranks ({world})."
        )
    if stage == 3 and (ep_size > 1 or tp_size > 1):
        raise InputError(
            "parallel.ep_size and parallel.tp_size must be 1 with ZeRO stage 3 "
            f"(engine={recipe.engine}), not {ep_size} and {tp_size}: "
            "it spreads every parameter over all ranks by itself."
        )


def _check_precision(recipe: TrainingRecipe, engine_config: dict[str, Any]) -> None:
    if engine_config.get("fp16", {}).get("enabled"):
        raise InputError(
            f"engine: {recipe.engine} enables fp16, which is not offered; enable bf16, or neither "
            "for fp32."
        )
    if engine_config.get("bf16", {}).get("enabled"):
        if zero_stage(engine_config) == 0:
            raise InputError(
                f"engine: {recipe.engine} enables bf16 at ZeRO stage 0, where DeepSpeed steps the "
                "optimizer once before there is a "
                "gradient; use stage 1, such as zero1_bf16."
            )
        import torch

        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
            including_emulation=False
        ):
            name = torch.cuda.get_device_name()
            raise InputError(
                f"engine: {recipe.engine} enables bf16, which {name} lacks; use an engine file "
                "without it, such as zero1_fp32."
            )
