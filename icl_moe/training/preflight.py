"""Checks before any rank starts. This module imports neither the engine nor the model, so that it
reports errors at once.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from icl_moe.data.location import make_cache
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import TOKENIZER_FOLDERS, Manifest, ShardSet
from icl_moe.devices import processors
from icl_moe.errors import InputError, shown
from icl_moe.inputs import read_json
from icl_moe.outputs import output_folder
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import to_dict
from icl_moe.tokenizers import IMAGE_TOKENIZERS
from icl_moe.training.initial_model import InitialModel
from icl_moe.training.run_folder import check_same_run, saved_steps

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

_SECTIONS = ("zero_optimization", "bf16", "fp16", "tensorboard", "csv_monitor", "wandb")
"""The sections of an engine file that are read here or documented in ds_configs/README.md."""

_READERS_A_PROCESSOR = 4
"""The most readers per processor; more would only wait for each other."""


def open_checked(recipe: TrainingRecipe, world: int) -> tuple[ShardSet, dict[str, Any]]:
    """The shards and the engine file of a recipe that can run on `world` ranks.

    Raises InputError, before any rank starts, for an output that cannot be written, shards that are
    missing or of another vocabulary or tokenizer, positions that do not suffice, validation shards
    of another kind, an initial model of another kind, batches that do not divide, layouts that are
    not supported, precision that the device lacks, and an engine file that DeepSpeed cannot read.
    """
    _check_output(recipe.training.output)
    shards = _open(recipe, "shards", recipe.data.shards)
    _check_shards(recipe, shards.manifest)
    if recipe.training.evaluate_every is not None:
        _check_validation(recipe, shards.manifest, open_validation(recipe).manifest)
    _check_earlier_run(recipe, shards.manifest)
    check_same_run(recipe, shards)
    initial = open_initial_model(recipe)
    if initial is not None:
        initial.check(recipe, shards)
    engine_config = read_engine(recipe.engine)
    _check_layout(recipe, world, zero_stage(engine_config))
    _check_reduction(recipe, engine_config)
    _check_optimizer(recipe, engine_config)
    _check_precision(recipe, engine_config)
    RankSlice.of(
        0, world, recipe.training.global_batch, recipe.training.micro_batch, recipe.parallel.tp_size
    )
    make_schedule(recipe, shards.manifest)
    for task in shards.manifest.samples:
        # This raises if the index lacks the counts.
        shards.target_counts(task, (), recipe.training.loss_on)
    _check_readers(recipe)
    _check_engine_values(recipe.engine, engine_config)
    return shards, engine_config


def _check_output(output: str) -> None:
    try:
        folder = output_folder(output)
    except InputError as error:
        raise InputError(f"training.output: {error}") from error
    if folder != Path(output):
        raise InputError(
            f"training.output: write {folder} instead of {output}; only a shell expands ~."
        )


def make_schedule(recipe: TrainingRecipe, manifest: Manifest) -> Schedule:
    """The order in which a run of this recipe takes the samples. Raises InputError if it cannot."""
    training = recipe.training
    return Schedule(
        manifest.samples,
        training.global_batch,
        training.seed,
        training.sampling,
        training.task_weights,
    )


def open_initial_model(recipe: TrainingRecipe) -> InitialModel | None:
    """The model from whose weights the run starts. None if the recipe names none, or if the run has
    a checkpoint already, from which it goes on; the model need not be there any more.
    """
    source, output = recipe.training.init_from, Path(recipe.training.output)
    return None if source is None or saved_steps(output) else InitialModel.open(source)


def open_validation(recipe: TrainingRecipe) -> ShardSet:
    """The shards of data.validation, which a recipe that evaluates while it trains has."""
    assert recipe.data.validation is not None
    return _open(recipe, "validation", recipe.data.validation)


def read_engine(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration `name`: a path, or the name of a file in ds_configs without its
    .json. The folder ds_configs in the current folder is searched before the shipped one.
    """
    shipped = Path(str(resources.files("icl_moe"))) / "ds_configs"
    candidates = [
        Path(name),
        *(folder / f"{name}.json" for folder in (Path("ds_configs"), shipped)),
    ]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(f"engine: there is no file {name} and no ds_configs/{name}.json.")
    try:
        config = read_json(path)
    except InputError as error:
        raise InputError(f"engine: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"engine: {path} must hold keys and values, not {shown(config)}.")
    for key in config:
        if key in _RECIPE_KEYS:
            raise InputError(
                f"engine: {path} sets '{key}', which follows from the recipe; leave it out."
            )
        # DeepSpeed ignores unknown keys, and also reads bf16 under another name.
        meant = difflib.get_close_matches(key.replace("float", "f"), _SECTIONS, n=1, cutoff=0.8)
        if meant and key not in _SECTIONS:
            raise InputError(f"engine: {path} has the key '{key}'; write '{meant[0]}'.")
    for key in _SECTIONS:
        _check_section(f"engine: {path}: {key}", config.get(key, {}))
    return config


def _check_section(where: str, section: Any) -> None:
    """Refuse a section that is not an object, and wrong values of keys that the trainer uses."""
    if not isinstance(section, dict):
        raise InputError(f"{where} must hold keys and values, not {shown(section)}.")
    if not isinstance(section.get("enabled", False), bool):
        raise InputError(f"{where}.enabled must be true or false, not {shown(section['enabled'])}.")
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise InputError(f"{where}.stage must be one of 0 | 1 | 2 | 3, not {shown(stage)}.")


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
            f"data.shards: {recipe.data.shards} was built for a vocabulary of {theirs.ids} ids "
            f"({to_dict(theirs)}), "
            f"the recipe's has {ours.ids} ({to_dict(ours)}); make them equal."
        )
    needed = manifest.format.length(manifest.examples + 1)
    if needed > recipe.model.positions:
        raise InputError(
            f"model.positions is {recipe.model.positions}, but the sequences of "
            f"{recipe.data.shards} take {needed} positions."
        )


def _check_validation(recipe: TrainingRecipe, training: Manifest, validation: Manifest) -> None:
    for name in ("format", "image_size", *TOKENIZER_FOLDERS):
        ours, theirs = getattr(training, name), getattr(validation, name)
        if ours != theirs:
            raise InputError(
                f"data.validation: {recipe.data.validation} has {name.replace('_', ' ')} {theirs}, "
                f"but {recipe.data.shards} has {ours}; "
                "build both in the same way."
            )
    if validation.examples > training.examples:
        raise InputError(
            f"data.validation: {recipe.data.validation} has {validation.examples} examples per "
            f"episode, more than the {training.examples} "
            f"of {recipe.data.shards}; build it with at most as many."
        )


def _check_earlier_run(recipe: TrainingRecipe, manifest: Manifest) -> None:
    """Raise InputError if the run began with another tokenizer. The meaning of codes depends on
    their tokenizer, so a run cannot continue with the codes of another one.
    """
    path = Path(recipe.training.output) / "model" / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for key in IMAGE_TOKENIZERS:
        theirs, ours = config.get(key), getattr(manifest, key)
        if theirs != ours:
            raise InputError(
                f"training.output: the run in {recipe.training.output} was on codes of the "
                f"{key.replace('_', ' ')} {theirs}, but {recipe.data.shards} holds those of "
                f"{ours}; set it to a new folder."
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


def _check_optimizer(recipe: TrainingRecipe, engine_config: dict[str, Any]) -> None:
    if recipe.optimizer.name != "muon":
        return
    if zero_stage(engine_config) or recipe.parallel.tp_size > 1:
        raise InputError(
            "optimizer.name=muon needs whole matrices on every rank: an engine of ZeRO stage 0, "
            f"such as zero0_fp32, not {recipe.engine}, and parallel.tp_size 1, not "
            f"{recipe.parallel.tp_size}."
        )


def _check_reduction(recipe: TrainingRecipe, engine_config: dict[str, Any]) -> None:
    scatters = engine_config.get("zero_optimization", {}).get("reduce_scatter", True)
    if zero_stage(engine_config) == 2 and recipe.model.sparse_layers and not scatters:
        raise InputError(
            f"engine: {recipe.engine} sets zero_optimization.reduce_scatter to "
            f"{json.dumps(scatters)}; ZeRO stage 2 needs it true for expert layers, whose "
            "gradients are averaged over other ranks than the rest."
        )


def _check_readers(recipe: TrainingRecipe) -> None:
    usable = processors()
    most = _READERS_A_PROCESSOR * usable
    if recipe.data.workers > most:
        raise InputError(
            f"data.workers must be at most {most} on this machine of {usable} processors, not "
            f"{recipe.data.workers}."
        )


def _check_engine_values(name: str, config: dict[str, Any]) -> None:
    """Refuse what DeepSpeed itself refuses. This is the last check, since importing DeepSpeed takes
    seconds.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # many types, since it does not check most keys
        raise InputError(f"engine: DeepSpeed refuses {name}: {_in_a_sentence(error)}.") from error


def _in_a_sentence(error: Exception) -> str:
    """The message of pydantic, or of an assertion, for the first wrong value."""
    listed = getattr(error, "errors", None)
    if listed is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
    first = listed()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {shown(first.get('input'))}"


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
