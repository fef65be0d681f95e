"""From a recipe to a DeepSpeed engine, and one micro-step on it.

Separate from the loop in trainer.py, because tests and benchmarks step an engine on batches of
their own.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from icl_moe.batch import TokenBatch
from icl_moe.data.schedule import RankSlice
from icl_moe.data.shards import Manifest
from icl_moe.deepspeed_internals import (
    norm_of_the_step_at_hand,
    set_counters,
    set_model_parallel_unit,
)
from icl_moe.model.config import DecoderConfig, joined_classes
from icl_moe.model.decoder import (
    InContextDecoder,
    extend_codebook,
    initialise,
    start_from_codebook,
)
from icl_moe.model.deepspeed_moe import exported_name, first_expert, sparse_layer_factory
from icl_moe.model.feed_forward import Experts, SparseFeedForward
from icl_moe.model.loss import DecoderLoss
from icl_moe.model.tensor_parallel import spread
from icl_moe.optim import gradient_norm
from icl_moe.optim.mt_adamw import MTAdamW
from icl_moe.optim.muon import Muon
from icl_moe.optim.parameter_groups import muon_groups, parameter_groups
from icl_moe.recipe import TrainingRecipe
from icl_moe.training.codebook import Codebook
from icl_moe.training.distributed import ModelParallelUnit, Place
from icl_moe.training.initial_model import InitialModel
from icl_moe.training.partitions import refresh_gates
from icl_moe.training.preflight import zero_stage


class TrainingEngine:
    """A new decoder on DeepSpeed. codebook: the initial embeddings for a recipe with
    model.codebook_init, or of the codes that `initial` lacks; not needed if the weights are then
    loaded from a checkpoint.
    initial: the model whose weights it starts with, instead of new ones. classes: by task, the
    classes that the model has been trained on, in addition to those of the manifest.

    deepspeed: the engine itself. norm: the global gradient norm of the last complete step
    before clipping, None if the step was skipped.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        manifest: Manifest,
        engine_config: dict[str, Any],
        part: RankSlice,
        place: Place,
        codebook: Codebook | None = None,
        initial: InitialModel | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._recipe = recipe
        self._device = place.device
        self.norm: float | None = None
        tp_size = recipe.parallel.tp_size
        unit = ModelParallelUnit(tp_size) if tp_size > 1 else None
        set_model_parallel_unit(unit)
        trained = recipe.training.tasks_of(manifest.samples)
        config = DecoderConfig.from_recipe(
            recipe,
            **manifest.of_model,
            classes=joined_classes(
                [{task: manifest.classes[task] for task in trained}, classes or {}]
            ),
        )
        model = _build_model(recipe, config, place, zero_stage(engine_config), codebook, initial)
        self._optimizer = _build_optimizer(recipe, model, lambda: self.norm)
        # DeepSpeed prints a line for each process group that it creates, on every rank.
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=nn.Module.to(model, place.device),
                optimizer=self._optimizer,
                config=_deepspeed_config(recipe, engine_config, part),
                mpu=unit,
                dist_init_required=False,
            )
        self.deepspeed.train()
        refresh_gates(self.deepspeed)

    @property
    def model(self) -> InContextDecoder:
        model: InContextDecoder = self.deepspeed.module
        return model

    @property
    def computes_alone(self) -> bool:
        """Whether a forward pass of this rank needs no other rank: it has all weights, and all
        experts.
        """
        parallel = self._recipe.parallel
        return bool(
            parallel.ep_size == 1
            and parallel.tp_size == 1
            and self.deepspeed.zero_optimization_stage() < 3
        )

    def begin_step(self, rate: float, task: str, probability: float) -> None:
        """Set the learning rate of the next step and, for MT-AdamW, the probability with which its
        task was drawn and the weight of that task.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_ratio", 1.0)
        if isinstance(self._optimizer, MTAdamW):
            self._optimizer.probability = probability
            self._optimizer.weight = (self._recipe.optimizer.task_weights or {}).get(task, 1.0)

    def backward(self, batch: TokenBatch, noise: tuple[int, int] | None) -> DecoderLoss:
        """Forward and backward of one micro-step."""
        loss: DecoderLoss = self.deepspeed(batch.to(self._device), noise=noise)
        self.deepspeed.backward(loss.total)
        return loss

    def step(self, skip: bool = False) -> bool:
        """After each micro-step's `backward`; at the last one of a step the optimizer changes the
        weights, unless `skip` is set or the gradient has no usable norm. Returns whether it did.

        A gradient that is not finite has an infinite norm on every rank: the norm is taken over all
        parameters, so the ranks agree without asking each other. `deepspeed.skipped_steps` counts
        the skipped steps.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return False
        self.norm = None
        if not self._has_own_norm:
            norm = gradient_norm.global_norm(self.model)
            self.norm = float(norm)
            if self._recipe.optimizer.clip is not None:
                gradient_norm.clip(self.model, norm, self._recipe.optimizer.clip)
        skipped = self.deepspeed.skipped_steps
        with _guarded(self._optimizer, lambda: not skip and self._norm_is_usable()) as calls:
            self.deepspeed.step()
        moved = any(calls)
        set_counters(self.deepspeed, skipped_steps=skipped + (not moved))
        if moved:
            refresh_gates(self.deepspeed)
        else:
            self.norm = None
        return moved

    @property
    def _has_own_norm(self) -> bool:
        """Whether the engine computes the norm and clips: not at ZeRO stage 0 in fp32, see
        optim/gradient_norm.py.
        """
        return bool(self.deepspeed.zero_optimization() or self.deepspeed.bfloat16_enabled())

    def _norm_is_usable(self) -> bool:
        """Called in the middle of a step, when DeepSpeed has computed the norm but not yet
        published it. Task-balanced AdamW divides by the norm, so it must not be 0 either.
        """
        if self.norm is None:
            self.norm = norm_of_the_step_at_hand(self.deepspeed)
        return (
            self.norm is not None
            and math.isfinite(self.norm)
            and (self.norm > 0 or not isinstance(self._optimizer, MTAdamW))
        )


@contextlib.contextmanager
def _guarded(
    optimizer: torch.optim.Optimizer, may_step: Callable[[], bool]
) -> Iterator[list[bool]]:
    """Within this context the engine steps as usual, and clears its gradients, but the optimizer
    under it steps only if it may. Gives a list with one entry for each call by the engine: whether
    the optimizer stepped.
    """
    step, calls = optimizer.step, list[bool]()

    def guarded(*_: object) -> None:
        calls.append(may_step())
        if calls[-1]:
            step()

    vars(optimizer)["step"] = guarded
    try:
        yield calls
    finally:
        del vars(optimizer)["step"]


def _build_model(
    recipe: TrainingRecipe,
    config: DecoderConfig,
    place: Place,
    stage: int,
    codebook: Codebook | None,
    initial: InitialModel | None,
) -> InContextDecoder:
    """This rank's part of a new model. At ZeRO stage 3 its experts are plain modules: DeepSpeed
    refuses its own layers there.
    """
    ep_size, tp_size = recipe.parallel.ep_size, recipe.parallel.tp_size
    sparse_layer = (
        SparseFeedForward
        if stage == 3
        else sparse_layer_factory(ep_size, place.rank % tp_size, tp_size)
    )
    model = InContextDecoder(config, sparse_layer, recipe.training.auxiliary_loss_weight)
    model.gradient_checkpointing = recipe.training.activation_checkpointing
    name = partial(
        exported_name, first_expert=first_expert(place.rank, ep_size, recipe.model.experts)
    )
    initialise(model, recipe.training.seed, name)
    first = recipe.vocabulary.input_range.start
    if recipe.model.codebook_init and codebook is not None and initial is None:
        start_from_codebook(
            model,
            codebook.vectors_KC,
            codebook.frequencies_K,
            first,
            recipe.training.seed,
            codebook.whiten,
            codebook.stages,
        )
    if initial is not None:
        initial.load_into(model, name)
        if initial.is_refined_by(recipe.vocabulary):
            assert codebook is not None, "the new codes start from their tokenizer's centroids"
            vectors_SKC = codebook.vectors_KC.unflatten(0, (codebook.stages, -1))
            extend_codebook(model, vectors_SKC, first, initial.vocabulary.feature_stages)
    if tp_size > 1:
        spread(model)
        gradient_norm.mark_parts(model)
    if stage == 3 and recipe.model.sparse_layers:
        # All experts of a layer are gathered together: ranks whose tokens go to different ones
        # would wait for each other forever.
        set_z3_leaf_modules(model, [Experts])
    return model


def _build_optimizer(recipe: TrainingRecipe, model: nn.Module, norm: Any) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    options: dict[str, Any] = dict(
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.epsilon,
    )
    if settings.name == "muon":
        ratio = settings.matrix_learning_rate / settings.learning_rate
        return Muon(muon_groups(model, settings.weight_decay, ratio), **options)
    groups = parameter_groups(model, settings.weight_decay)
    if settings.name == "mt_adamw":
        return MTAdamW(groups, norm, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def _deepspeed_config(
    recipe: TrainingRecipe, engine_config: dict[str, Any], part: RankSlice
) -> dict[str, Any]:
    bf16 = engine_config.get("bf16", {}).get("enabled", False)
    config = {
        **engine_config,
        "train_batch_size": recipe.training.global_batch,
        "train_micro_batch_size_per_gpu": recipe.training.micro_batch,
        "gradient_accumulation_steps": part.micro_steps,
        # At ZeRO stage 0 in fp32 we clip ourselves, see optim/gradient_norm.py.
        "gradient_clipping": (recipe.optimizer.clip or 0.0)
        if zero_stage(engine_config) or bf16
        else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for section in ("tensorboard", "csv_monitor"):
        if section in config:
            config[section] = {
                "output_path": recipe.training.output,
                "job_name": section,
                **config[section],
            }
    return config
