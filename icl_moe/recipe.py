"""Recipes: YAML files read strictly into typed, frozen dataclasses.

`load_recipe` serves every stage; `TrainingRecipe` is what `icl-moe train` reads. An unknown key, a
value of the wrong type or settings that cannot work together are an `InputError` that names the key
and the nearest right one.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from icl_moe.errors import InputError
from icl_moe.inputs import check_is_file
from icl_moe.tasks import TASKS
from icl_moe.vocabulary import Vocabulary

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class DataSettings:
    """What to train on. `shards` and `validation` are folders that `icl-moe shards build` wrote, or
    their fsspec URLs (s3://bucket/folder).

    cache, cache_gigabytes: where the files of a URL are kept and how much room they may take; by
    default the user's cache folder. Room for
    all shards is best: each step reads from everywhere.
    """

    shards: str
    validation: str | None = None
    layout: Literal["packed", "padded"] = "packed"
    workers: int = 1
    cache: str | None = None
    cache_gigabytes: float = 100.0


@dataclass(frozen=True)
class ModelSettings:
    """The decoder.

    layers_with_experts: counted from 0; the paper's "even-numbered layers" are read as 2, 4, ..
    counted from 1.
    feed_forward: `dense`; `token`, GShard's experts, which is stock deepspeed.moe; or `attributes`,
    for which there are two more settings.
    gate_input: what its gate reads, `attributes` (Uni-Perceiver-MoE), `token` (GShard) or the sum
    of both.
    combination: `outputs`, the weighted sum of the experts' outputs (the paper's formula), or
    `weights`, the output of one expert whose weights are the weighted sum of theirs
    (Uni-Perceiver-MoE's code, at a dense layer's cost).
    gate_noise: whether the gate of the attributes is noisy in training.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    positions: int = 2060
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-12
    feed_forward: Literal["dense", "token", "attributes"] = "attributes"
    layers_with_experts: tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    experts: int = 8
    experts_per_token: int = 2
    gate_input: Literal["attributes", "token", "token+attributes"] = "attributes"
    combination: Literal["outputs", "weights"] = "outputs"
    gate_noise: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(
                f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})."
            )
        if self.experts_per_token not in (1, 2) or self.experts < self.experts_per_token:
            raise InputError(
                "model.experts_per_token must be 1 or 2 and at most model.experts, not "
                f"{self.experts_per_token}."
            )
        if self.combination == "weights" and self.gate_input != "attributes":
            raise InputError(
                "model.combination=weights needs model.gate_input=attributes: only whole streams "
                "share merged experts."
            )
        outside = [layer for layer in self.layers_with_experts if not 0 <= layer < self.layers]
        if outside:
            raise InputError(
                f"model.layers_with_experts names layer {outside[0]}, but the layers are "
                f"0..{self.layers - 1}."
            )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward is experts; none in a dense model."""
        return () if self.feed_forward == "dense" else tuple(sorted(set(self.layers_with_experts)))


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, or MT-AdamW for unmixed batches of several tasks, and the learning rate.

    clip: the largest global gradient norm, or null for no clipping. MT-AdamW divides by the norm,
    so clipping would do nothing there.
    task_weights: omega_k of MT-AdamW, with which force a task pushes; 1 for tasks that are not
    named.
    """

    name: Literal["adamw", "mt_adamw"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 1000
    clip: float | None = 0.5
    task_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.task_weights is not None:
            if self.name != "mt_adamw":
                raise InputError(
                    f"optimizer.task_weights must be null with optimizer.name={self.name}: only "
                    "mt_adamw weighs tasks."
                )
            _check_weights("optimizer.task_weights", self.task_weights)
        if self.name == "mt_adamw" and self.clip is not None:
            raise InputError(
                "optimizer.clip must be null with optimizer.name=mt_adamw, which divides by the "
                "gradient's norm anyway."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"optimizer.betas must be two numbers in [0, 1), not {list(self.betas)}."
            )


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how much a step, what is kept.

    task_weights: with `unmixed` sampling, a task is drawn with probability proportional to its
    weight here, and never if it is not named; null for the square root of its number of samples.
    stop_after: save and stop at that step, as an interruption would; schedules still aim at
    `steps`.
    input_loss_weight: w_in, the loss weight of the input image's codes (0.5 in the paper's
    caption-only model).
    skipped_steps: how many steps may be left out, over the whole run, because their loss is not
    finite, before training ends.
    hang_seconds: without progress for so long, the run ends and names the rank that stands still;
    null to wait for ever.
    dry_run: before the first step, compute the largest batch of every task, so that one that is too
    large for the memory shows at once.
    evaluate_every, evaluate_episodes: every so many steps, ask the first so many episodes of each
    task of data.validation; null for never.
    gradient_report_every: how often the gradient's norm is written by task and part of the model;
    null for never.
    deterministic: whether operations whose result may differ from run to run on a GPU are replaced
    by slower ones that repeat it.
    """

    steps: int
    output: str
    stop_after: int | None = None
    global_batch: int = 512
    micro_batch: int = 8
    seed: int = 0
    sampling: Literal["unmixed", "mixed"] = "unmixed"
    task_weights: dict[str, float] | None = None
    input_loss_weight: float = 0.0
    auxiliary_loss_weight: float = 0.02
    save_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    activation_checkpointing: bool = False
    skipped_steps: int = 5
    hang_seconds: float | None = 1800.0
    dry_run: bool = True
    evaluate_every: int | None = None
    evaluate_episodes: int = 32
    gradient_report_every: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "global_batch",
            "micro_batch",
            "save_every",
            "keep_checkpoints",
            "log_every",
            "evaluate_episodes",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("evaluate_every", "gradient_report_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(
                    f"training.{name} must be at least 1, or null for never, not "
                    f"{getattr(self, name)}."
                )
        if self.task_weights is not None:
            if self.sampling == "mixed":
                raise InputError(
                    "training.task_weights must be null with training.sampling=mixed, which draws "
                    "no tasks."
                )
            _check_weights("training.task_weights", self.task_weights)
        if self.global_batch % self.micro_batch:
            raise InputError(
                f"training.global_batch ({self.global_batch}) must be a multiple of "
                f"training.micro_batch ({self.micro_batch})."
            )


def _check_weights(key: str, weights: dict[str, float]) -> None:
    for task, weight in weights.items():
        if task not in TASKS:
            raise InputError(
                f"{key} names the task {task}{_nearest(task, list(TASKS))}; known are "
                f"{', '.join(TASKS)}."
            )
        if not (0 < weight < math.inf):
            raise InputError(f"{key}.{task} must be a positive number, not {weight}.")
    if not weights:
        raise InputError(f"{key} must name a task, or be null.")


@dataclass(frozen=True)
class ParallelSettings:
    """ep_size: over how many ranks the experts of a layer are spread. tp_size: over how many a
    layer's matrices are split.
    """

    ep_size: int = 1
    tp_size: int = 1


@dataclass(frozen=True)
class TrainingRecipe:
    """What `icl-moe train` reads. `engine` is a file of ds_configs (a name without .json, or a
    path).
    """

    data: DataSettings
    training: TrainingSettings
    vocabulary: Vocabulary = Vocabulary()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    parallel: ParallelSettings = ParallelSettings()
    engine: str = "zero1_fp32"

    def __post_init__(self) -> None:
        if self.optimizer.name == "mt_adamw" and self.training.sampling == "mixed":
            raise InputError(
                "training.sampling must be unmixed with optimizer.name=mt_adamw, which needs one "
                "task a step."
            )
        if self.training.evaluate_every is not None and self.data.validation is None:
            raise InputError(
                "training.evaluate_every needs data.validation, a folder of shards to evaluate on."
            )


def load_recipe(
    kind: type[Recipe], source: str, overrides: typing.Sequence[str] = (), package: str = "icl_moe"
) -> Recipe:
    """Read the recipe `source`, a path or the name of one shipped in `package`, with
    `key.path=value` overrides.

    Raises InputError for a file that is not there or not YAML, a key that `kind` lacks, and a value
    of another type.
    """
    path = find_recipe(source, package)
    values = _read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(
                f"'{override}' is not a setting: write key=value, such as training.steps=20."
            )
        _assign(values, key.split("."), _parse_scalar(override, text))
    return _build(kind, values, origin=path.name, prefix="")


def find_recipe(source: str, package: str) -> Path:
    """The file that `source` (a path, or a shipped recipe's name) stands for."""
    if source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        check_is_file(path)
        return path
    folder = Path(str(resources.files(package))) / "recipes"
    path = folder / f"{source}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise InputError(
            f"There is no recipe named '{source}'{_nearest(source, names)}; shipped are "
            f"{', '.join(names)}."
        )
    return path


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, as `load_recipe` would read them back from YAML."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def from_dict(kind: type[Recipe], values: dict[str, Any], origin: str) -> Recipe:
    """The inverse of `to_dict`, as strict as `load_recipe`; `origin` names the file in error
    messages.
    """
    return _build(kind, values, origin=origin, prefix="")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML as safe_load reads it, but a key that stands twice is an error: plain YAML takes the
    last one in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{name}' stands there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None)
        raise InputError(
            f"{path}{where} is not valid YAML{f': {what}' if what else ''}."
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    return values


def _parse_scalar(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"The value in '{override}' is not valid YAML.") from error


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[keys[-1]] = value


def _build(kind: Any, values: Any, origin: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(
            f"{origin}: '{prefix.rstrip('.')}' must hold keys and values, not {values!r}."
        )
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            known = ", ".join(prefix + name for name in fields)
            raise InputError(
                f"{origin}: unknown key '{prefix}{key}'{_nearest(str(key), list(fields), prefix)}; "
                f"known here are {known}."
            )
    arguments = {
        key: _convert(hints[key], value, origin, prefix + key) for key, value in values.items()
    }
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise InputError(f"{origin}: the key '{prefix}{name}' is missing.")
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error


def _convert(kind: Any, value: Any, origin: str, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value if value is not None else {}, origin, key + ".")
    options = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        for option in inner[:-1]:
            try:
                return _convert(option, value, origin, key)
            except InputError:
                continue
        return _convert(inner[-1], value, origin, key)
    if typing.get_origin(kind) is Literal:
        # YAML reads a bare `none` as text but `no`, `off` and `null` as values: take null to mean
        # the choice "none".
        value = "none" if value is None and "none" in options else value
        if value not in options:
            choices = " | ".join(str(option) for option in options)
            raise InputError(
                f"{origin}: '{key}' must be one of {choices}, not "
                f"{value!r}{_nearest(str(value), [str(o) for o in options])}."
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{origin}: '{key}' must be a list, not {value!r}.")
        return tuple(_convert(options[0], item, origin, key) for item in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{origin}: '{key}' must hold keys and values, not {value!r}.")
        return {
            _convert(options[0], k, origin, key): _convert(options[1], v, origin, f"{key}.{k}")
            for k, v in value.items()
        }
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text.
        except ValueError:
            pass
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is Any or (
        isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    ):
        return value
    names: dict[type, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "keys and values",
    }
    raise InputError(f"{origin}: '{key}' must be {names.get(kind, kind.__name__)}, not {value!r}.")


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{prefix}{matches[0]}'?)" if matches else ""
