"""The training recipe, for `icl-moe train`, section by section; `load_recipe` reads one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from icl_moe.errors import InputError
from icl_moe.ranges import (
    Count,
    DropoutRate,
    Epsilon,
    LearningRate,
    Natural,
    Range,
    TaskWeight,
    Weight,
)
from icl_moe.sequence import InputLoss, LossOn
from icl_moe.settings import load_recipe as load_recipe
from icl_moe.tasks import find_task
from icl_moe.vocabulary import Vocabulary


@dataclass(frozen=True)
class DataSettings:
    """What to train on. `shards` and `validation` are folders that `icl-moe shards build` wrote, or
    their fsspec URLs (s3://bucket/folder).

    cache, cache_gigabytes: the folder in which the files of a URL are kept, by default the user's
    cache folder, and how much space they may take. Space for all shards is best, because each step
    reads from all of them.
    """

    shards: str
    validation: str | None = None
    layout: Literal["packed", "padded"] = "packed"
    workers: Natural = 1
    cache: str | None = None
    cache_gigabytes: Annotated[float, Range(above=0)] = 100.0


@dataclass(frozen=True)
class ModelSettings:
    """The decoder.

    layers_with_experts: counted from 0; the paper's "even-numbered layers" are read as 2, 4, ..
    counted from 1.
    feed_forward: `dense`; `token`, GShard's experts, which is stock deepspeed.moe; or `attributes`,
    for which there are two more settings.
    gate_input: what its gate reads, `attributes` (Uni-Perceiver-MoE), `token` (GShard), the sum
    of both, or `none`: there is no gate, and each stream of a task has one expert of its own.
    combination: `outputs`, the weighted sum of the experts' outputs (the paper's formula), or
    `weights`, the output of one expert whose weights are the weighted sum of theirs
    (Uni-Perceiver-MoE's code, at a dense layer's cost).
    gate_noise: whether the gate of the attributes is noisy in training.
    link: whether a position that predicts or holds a cell of an output image is given the code of
    that cell in the pair's own input image: W E[c] is added to it, with a separate matrix W.
    initialisation: `gpt2`, N(0, 0.02^2); or `fan_in`, with a scale that does not depend on the
    width, and queries that start equal to keys (icl_moe.model.decoder.initialise).
    codebook_init: whether the embeddings of input images' codes start as a random projection of
    their tokenizer's code vectors, so that codes which look alike have similar embeddings at first.
    """

    layers: Annotated[int, Range(1, 1024)] = 12
    width: Annotated[int, Range(1, 65_536)] = 768
    heads: Count = 12
    positions: Annotated[int, Range(1, 1 << 20)] = 2060
    dropout: DropoutRate = 0.1
    attention_dropout: DropoutRate = 0.1
    layer_norm_epsilon: Epsilon = 1e-12
    feed_forward: Literal["dense", "token", "attributes"] = "attributes"
    layers_with_experts: tuple[Natural, ...] = (1, 3, 5, 7, 9, 11)
    experts: Annotated[int, Range(1, 4096)] = 8
    experts_per_token: Annotated[int, Range(1, 2)] = 2
    gate_input: Literal["attributes", "token", "token+attributes", "none"] = "attributes"
    combination: Literal["outputs", "weights"] = "outputs"
    gate_noise: bool = True
    link: bool = False
    initialisation: Literal["gpt2", "fan_in"] = "gpt2"
    codebook_init: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(
                f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})."
            )
        if self.experts < self.experts_per_token:
            raise InputError(
                f"model.experts_per_token ({self.experts_per_token}) must be at most model.experts "
                f"({self.experts})."
            )
        if self.combination == "weights" and (
            self.gate_input not in ("attributes", "none") or self.feed_forward == "token"
        ):
            raise InputError(
                "model.combination=weights needs model.feed_forward=attributes and "
                "model.gate_input=attributes or none: only whole streams share merged experts."
            )
        if self.gate_input == "none" and (
            self.experts_per_token != 1 or self.feed_forward != "attributes"
        ):
            raise InputError(
                "model.gate_input=none needs model.feed_forward=attributes and "
                "model.experts_per_token=1: each stream has one expert of its own."
            )
        outside = [layer for layer in self.layers_with_experts if layer >= self.layers]
        if outside:
            raise InputError(
                f"model.layers_with_experts names layer {outside[0]}, but the layers are "
                f"0..{self.layers - 1}."
            )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward is experts; none in a dense model."""
        return () if self.feed_forward == "dense" else tuple(sorted(set(self.layers_with_experts)))


TRAINING_ONLY = ("dropout", "attention_dropout", "initialisation", "codebook_init", "gate_noise")
"""The settings of a model that only its training reads."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; MT-AdamW for unmixed batches of several tasks; or Muon, which moves the matrices, with
    AdamW for the rest; and the learning rate.

    matrix_learning_rate: of what Muon moves; it follows the same schedule.

    clip: the largest global gradient norm, or null for no clipping. MT-AdamW divides by the norm,
    so clipping would have no effect there.
    task_weights: omega_k of MT-AdamW, the influence of each task; 1 for tasks that are not named.
    """

    name: Literal["adamw", "mt_adamw", "muon"] = "adamw"
    learning_rate: LearningRate = 1e-4
    matrix_learning_rate: LearningRate = 0.02
    weight_decay: Annotated[float, Range(0)] = 0.05
    betas: tuple[Annotated[float, Range(0, below=1)], ...] = (0.9, 0.999)
    epsilon: Epsilon = 1e-8
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Natural = 1000
    clip: Annotated[float, Range(above=0)] | None = 0.5
    task_weights: dict[str, TaskWeight] | None = None

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
        if len(self.betas) != 2:
            raise InputError(f"optimizer.betas must be two numbers, not {list(self.betas)}.")


@dataclass(frozen=True)
class TrainingSettings:
    """The length of a run, the size of a step, and what is saved and reported.

    task_weights: with `unmixed` sampling, a task is drawn with probability proportional to its
    weight here, and never if it is not named; null for the square root of its number of samples.
    stop_after: save and stop at that step, as an interruption would; schedules still aim at
    `steps`. init_from: the exported model from whose weights a new run starts (a folder, a shipped
    name, or OWNER/NAME of the Hub); its optimizer and schedule start anew. loss_on: the pairs that
    have a loss, `all` of an episode or only the `query`.
    mask_corruption: whether codes of the query's mask are hidden from the model as [MASK], in a
    share that is drawn for each episode (icl_moe.data.corruption); parallel decoding needs it.
    input_loss_weight: w_in, the loss weight of the input image's codes (0.5 in the paper's
    caption-only model). input_loss: what it weighs, each of these `tokens` against a token of the
    output, or the `mean` loss of the inputs of a global batch against that of its outputs.
    skipped_steps: how many steps may be skipped in the whole run, because
    their loss or gradient is not finite, before training ends. hang_seconds: after so long without
    progress, the run ends and names the rank that hangs; null to wait forever. dry_run: before the
    first step, compute the largest batch of every task, so that one that is too large for the
    memory is detected at once. accept_changes: whether a run may continue with other shards, or
    another seed, global batch, sampling or task weights, than it has trained with so far.
    evaluate_every, evaluate_episodes: how often, in steps, to evaluate the first so many episodes
    of each task of data.validation; null for never. gradient_report_every: how often, in steps, the
    gradient's norm is written by task and part of the model; null for never. deterministic: whether
    operations whose result may differ from run to run on a GPU are replaced by slower ones that are
    repeatable.
    """

    steps: Count
    output: str
    stop_after: Count | None = None
    init_from: str | None = None
    global_batch: Count = 512
    micro_batch: Count = 8
    seed: Natural = 0
    sampling: Literal["unmixed", "mixed"] = "unmixed"
    task_weights: dict[str, TaskWeight] | None = None
    loss_on: LossOn = "all"
    mask_corruption: bool = False
    input_loss_weight: Weight = 0.0
    input_loss: InputLoss = "tokens"
    auxiliary_loss_weight: Weight = 0.02
    save_every: Count = 1000
    keep_checkpoints: Count = 2
    log_every: Count = 10
    activation_checkpointing: bool = False
    skipped_steps: Natural = 5
    hang_seconds: Annotated[float, Range(1)] | None = 1800.0
    dry_run: bool = True
    accept_changes: bool = False
    evaluate_every: Count | None = None
    evaluate_episodes: Count = 32
    gradient_report_every: Count | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
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

    def tasks_of(self, samples: Mapping[str, int]) -> list[str]:
        """The tasks that a run trains on, of shards with these numbers of samples of each task."""
        drawn = samples if self.task_weights is None else self.task_weights
        return [task for task, count in samples.items() if count and task in drawn]


def _check_weights(key: str, weights: dict[str, float]) -> None:
    for task in weights:
        find_task(task, key)
    if not weights:
        raise InputError(f"{key} must name a task, or be null.")


@dataclass(frozen=True)
class ParallelSettings:
    """ep_size: the number of ranks over which the experts of a layer are spread. tp_size: the
    number of ranks over which the matrices of a layer are split.
    """

    ep_size: Count = 1
    tp_size: Count = 1


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
                "task per step."
            )
        if self.training.evaluate_every is not None and self.data.validation is None:
            raise InputError(
                "training.evaluate_every needs data.validation, a folder of shards to evaluate on."
            )
        if self.training.input_loss_weight and self.vocabulary.feature_stages > 1:
            raise InputError(
                "training.input_loss_weight must be 0 with vocabulary.feature_stages above 1: the "
                "model reads combined codes, but cannot write them."
            )
        if self.training.mask_corruption and not self.vocabulary.mask:
            raise InputError(
                "training.mask_corruption needs vocabulary.mask=true, for codes that are hidden."
            )
