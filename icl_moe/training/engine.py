"""From a recipe to a DeepSpeed engine, and one micro-step on it.

Apart from the loop in trainer.py, because tests and benchmarks step an engine on batches of their own.
"""

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from icl_moe.data.batch import TokenBatch
from icl_moe.data.schedule import RankSlice
from icl_moe.data.shards import Manifest
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.loss import DecoderLoss
from icl_moe.model.moe import exported_name, sparse_layer_factory
from icl_moe.optim import gradient_norm
from icl_moe.optim.mt_adamw import MTAdamW
from icl_moe.optim.parameter_groups import parameter_groups
from icl_moe.recipe import TrainingRecipe, to_dict
from icl_moe.training.distributed import Ranks


class TrainingEngine:
    """A freshly initialised decoder on DeepSpeed.

    deepspeed: the engine itself. norm: the global gradient norm of the last whole step before clipping, None where there was none.
    """

    def __init__(self, recipe: TrainingRecipe, manifest: Manifest, engine_config: dict[str, Any], part: RankSlice, ranks: Ranks) -> None:
        self._recipe = recipe
        self._device = ranks.device
        self.norm: float | None = None
        model = _build_model(recipe, manifest, ranks)
        self._optimizer = _build_optimizer(recipe, model, self._norm_in_step)
        with contextlib.redirect_stdout(io.StringIO()):  # A line a rank and layer group about process groups being made.
            self.deepspeed, *_ = deepspeed.initialize(
                model=nn.Module.to(model, ranks.device),
                optimizer=self._optimizer,
                config=_deepspeed_config(recipe, engine_config, part),
                dist_init_required=False,
            )
        self.deepspeed.train()

    @property
    def model(self) -> InContextDecoder:
        model: InContextDecoder = self.deepspeed.module
        return model

    def begin_step(self, rate: float, task_probability: float) -> None:
        """Set the learning rate of the coming step, and the probability with which its task was drawn (for MT-AdamW)."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        if isinstance(self._optimizer, MTAdamW):
            self._optimizer.probability = task_probability

    def backward(self, batch: TokenBatch, noise: tuple[int, int] | None) -> DecoderLoss:
        """Forward and backward of one micro-step."""
        loss: DecoderLoss = self.deepspeed(batch.to(self._device), noise=noise)
        self.deepspeed.backward(loss.total)
        return loss

    def step(self, skip: bool = False) -> None:
        """After each micro-step's `backward`; at the last one of a step the optimizer moves, unless `skip`."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and not self._has_own_norm:
            norm = gradient_norm.global_norm(self.model)
            self.norm = float(norm)
            if self._recipe.optimizer.clip is not None:
                gradient_norm.clip(self.model, norm, self._recipe.optimizer.clip)
        with _standing_still(self._optimizer) if skip else contextlib.nullcontext():
            self.deepspeed.step()
        if last and self._has_own_norm:
            norm = self.deepspeed.get_global_grad_norm()
            self.norm = None if norm is None else float(norm)

    @property
    def _has_own_norm(self) -> bool:
        """Whether the engine computes the norm and clips: not at ZeRO stage 0 in fp32, see optim/gradient_norm.py."""
        return bool(self.deepspeed.zero_optimization() or self.deepspeed.bfloat16_enabled())

    def _norm_in_step(self) -> float | Tensor | None:
        """The norm as the optimizer needs it, in the middle of a step, when DeepSpeed has computed but not yet published it."""
        return self.deepspeed.optimizer._global_grad_norm if self._has_own_norm else self.norm


@contextlib.contextmanager
def _standing_still(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the engine steps as always, and clears its gradients, but the optimizer under it does nothing."""
    vars(optimizer)["step"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(optimizer)["step"]


def _build_model(recipe: TrainingRecipe, manifest: Manifest, ranks: Ranks) -> InContextDecoder:
    config = DecoderConfig.from_recipe(
        recipe,
        format=to_dict(manifest.format),
        image_size=manifest.image_size,
        examples=manifest.examples,
        image_tokenizer=manifest.image_tokenizer,
        classes={task: sorted(classes) for task, classes in manifest.classes.items()},
    )
    ep_size = recipe.parallel.ep_size
    model = InContextDecoder(config, sparse_layer_factory(ep_size), recipe.training.auxiliary_loss_weight)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    # DeepSpeed spreads a layer's experts over ep_size consecutive ranks.
    first_expert = ranks.rank % ep_size * (recipe.model.experts // ep_size)
    initialise(model, recipe.training.seed, partial(exported_name, first_expert=first_expert))
    return model


def _build_optimizer(recipe: TrainingRecipe, model: nn.Module, norm: Any) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    groups = parameter_groups(model, settings.weight_decay)
    options: dict[str, Any] = dict(lr=settings.learning_rate, betas=(settings.betas[0], settings.betas[1]), eps=settings.epsilon)
    return MTAdamW(groups, norm, **options) if settings.name == "mt_adamw" else torch.optim.AdamW(groups, **options)


def _deepspeed_config(recipe: TrainingRecipe, engine_config: dict[str, Any], part: RankSlice) -> dict[str, Any]:
    stage = engine_config.get("zero_optimization", {}).get("stage", 0)
    bf16 = engine_config.get("bf16", {}).get("enabled", False)
    config = {
        **engine_config,
        "train_batch_size": recipe.training.global_batch,
        "train_micro_batch_size_per_gpu": recipe.training.micro_batch,
        "gradient_accumulation_steps": part.micro_steps,
        # At ZeRO stage 0 in fp32 we clip ourselves, see optim/gradient_norm.py.
        "gradient_clipping": (recipe.optimizer.clip or 0.0) if stage or bf16 else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for section in ("tensorboard", "csv_monitor"):
        if section in config:
            config[section] = {"output_path": recipe.training.output, "job_name": section, **config[section]}
    return config
