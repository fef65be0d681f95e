"""A run of the trainer on two ranks equals a plain loop without an engine, so it applies the recipe
and the schedule correctly.
"""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from plain_mt_adamw import plain_step
from training import training_on_ranks
from training.test_operator import curve

from icl_moe.batch import collate
from icl_moe.data.corruption import hide_query_mask
from icl_moe.data.schedule import Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import to_dict
from icl_moe.training.checkpoint import export
from icl_moe.training.monitor import ProgressMonitor

FIGURES = ("image_loss", "text_loss", "auxiliary_loss", "gradient_norm", "learning_rate")
STEPS, STOP, SEED = 6, 4, 1
RATE, WARMUP, DECAY, BETAS = 3e-3, 2, 0.3, (0.8, 0.95)
INPUT_WEIGHT, AUXILIARY_WEIGHT, OMEGA = 0.5, 0.3, {"captioning": 3.0}
COMMON = (
    f"training.steps={STEPS}",
    f"training.stop_after={STOP}",
    f"training.seed={SEED}",
    f"training.input_loss_weight={INPUT_WEIGHT}",
    f"training.auxiliary_loss_weight={AUXILIARY_WEIGHT}",
    "training.dry_run=false",
    "data.workers=0",
    "model.dropout=0",
    "model.gate_noise=true",
    f"optimizer.learning_rate={RATE}",
    f"optimizer.weight_decay={DECAY}",
    f"optimizer.betas={list(BETAS)}",
    f"optimizer.warmup_steps={WARMUP}",
)
RUNS = {
    "mt_adamw": (
        "optimizer.name=mt_adamw",
        "optimizer.clip=null",
        "optimizer.task_weights={captioning: 3}",
    ),
    "adamw": ("optimizer.name=adamw", "optimizer.clip=0.5", "optimizer.epsilon=1e-3"),
    "adamw, drawn by weights": (
        "optimizer.name=adamw",
        "optimizer.clip=null",
        "training.task_weights={captioning: 1, segmentation: 1}",
    ),
    "adamw, on the query whose mask is corrupted": (
        "optimizer.name=adamw",
        "optimizer.clip=null",
        "training.loss_on=query",
        "training.mask_corruption=true",
    ),
}


def rate(step: int) -> float:
    """A linear warm-up, then half a cosine down to zero at the last step of the recipe."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE / 2 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def plain_run(
    recipe: TrainingRecipe, shards: ShardSet
) -> tuple[dict[str, dict[int, float]], InContextDecoder]:
    """The expected log, by figure and samples seen, and the decoder after the last step."""
    manifest, settings = shards.manifest, recipe.training
    schedule = Schedule(manifest.samples, 4, SEED, weights=settings.task_weights)
    roots = {task: math.sqrt(count) for task, count in manifest.samples.items()}
    decoder = InContextDecoder(
        DecoderConfig.from_recipe(recipe, format=to_dict(manifest.format)),
        auxiliary_weight=AUXILIARY_WEIGHT,
    )
    initialise(decoder, SEED)
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in decoder.named_parameters()
    }
    logged: dict[str, dict[int, float]] = {name: {} for name in FIGURES}
    for step in range(STOP):
        task = schedule.task(step)
        sequences = [shards.sample(*sample).sequence for sample in schedule.samples(step)]
        if settings.mask_corruption:
            sequences = [
                hide_query_mask(sequence, manifest.format.vocabulary, SEED, step, place)
                for place, sequence in enumerate(sequences)
            ]
        batch = collate(
            sequences,
            manifest.format.vocabulary,
            task,
            input_weight=INPUT_WEIGHT,
            loss_on=settings.loss_on,
        )
        decoder.zero_grad()
        loss = decoder(batch, noise=(SEED, step))
        loss.total.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in decoder.named_parameters()
        }
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        if recipe.optimizer.name == "mt_adamw":
            drawn = roots[task] / sum(roots.values())
            scale = {"norm": norm, "probability": drawn, "omega": OMEGA.get(task, 1.0)}
        else:
            clip = recipe.optimizer.clip
            scale = {"norm": 1.0 if clip is None else max(1.0, norm / clip), "probability": 1.0}
        for name, parameter in decoder.named_parameters():
            decay = DECAY if parameter.dim() >= 2 and "embedding" not in name else 0.0
            parameter.data, *moments[name] = plain_step(
                parameter.detach(),
                *moments[name],
                gradients[name],
                t=step + 1,
                lr=rate(step),
                betas=BETAS,
                eps=recipe.optimizer.epsilon,
                decay=decay,
                **scale,
            )
        samples = 4 * (step + 1)
        logged["learning_rate"][samples] = rate(step)
        logged["gradient_norm"][samples] = norm
        logged["auxiliary_loss"][samples] = loss.auxiliary.item()
        for modality in ("image", "text"):
            weight = getattr(loss, f"{modality}_weight").item()
            if weight:
                total = getattr(loss, f"{modality}_sum").item()
                logged[f"{modality}_loss"][samples] = total / weight
    return logged, decoder


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_trains_as_a_plain_loop(rank_group, shards, tmp_path, name):
    settings = (*COMMON, *RUNS[name])
    for rank in rank_group(2).run(training_on_ranks.run, shards, tmp_path / "run", settings):
        assert rank["ended"] == "well"
    recipe = training_on_ranks.load(shards, tmp_path, *settings)
    logged, decoder = plain_run(recipe, ShardSet(shards))
    for figure in FIGURES:
        found = curve(tmp_path / "run", f"train/{figure}")
        assert found == pytest.approx(logged[figure], rel=1e-4), figure
    assert logged["image_loss"].keys() != logged["text_loss"].keys(), "both tasks occur"
    export(tmp_path / "run", tmp_path / "model")
    trained = dict(InContextDecoder.from_pretrained(tmp_path / "model").named_parameters())
    for weight, parameter in decoder.named_parameters():
        difference = (trained[weight] - parameter).abs()
        # The true gradient of the keys' biases is zero: Adam follows rounding errors, and nothing
        # depends on them.
        if weight.endswith("qkv.bias"):
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max() < RATE / 20, weight


def seeds_of_forward_passes(place: Any, *arguments: Any) -> list[int]:
    """The dropout seed of each forward pass of this rank in a run."""
    seeds, forward = [], InContextDecoder.forward

    def record(decoder: InContextDecoder, batch: Any, noise: Any = None) -> Any:
        seeds.append(torch.initial_seed())
        return forward(decoder, batch, noise)

    with mock.patch.object(InContextDecoder, "forward", record):
        assert training_on_ranks.run(place, *arguments)["ended"] == "well"
    return seeds


def test_every_rank_step_and_micro_step_draws_its_own_dropout_and_draws_it_again(
    rank_group, shards, tmp_path
):
    def seeds(output: str, *settings: str) -> list[list[int]]:
        arguments = (shards, tmp_path / output, (*COMMON, *settings))
        return rank_group(2).run(seeds_of_forward_passes, *arguments)

    whole = seeds("whole")
    drawn = [seed for rank in whole for seed in rank]
    assert len(set(drawn)) == len(drawn) == 2 * STOP * 2
    halves = seeds("halves", "training.stop_after=1"), seeds("halves")
    assert [first + rest for first, rest in zip(*halves, strict=True)] == whole
    other = seeds("other", "training.seed=2", "training.stop_after=1")
    assert not set(drawn) & {seed for rank in other for seed in rank}


def counts_of_micro_steps(place: Any, *arguments: Any) -> list[tuple[int, int]]:
    """The tokens and floating-point operations that this rank counts for each micro-step of a
    run.
    """
    counts: list[tuple[int, int]] = []
    add = ProgressMonitor.add

    def record(monitor: ProgressMonitor, task: str, loss: Any, tokens: int, flops: int) -> None:
        counts.append((tokens, flops))
        add(monitor, task, loss, tokens, flops)

    with mock.patch.object(ProgressMonitor, "add", record):
        assert training_on_ranks.run(place, *arguments)["ended"] == "well"
    return counts


def test_tokens_that_tensor_ranks_share_are_counted_once(rank_group, shards, tmp_path):
    def total(tp_size: int) -> tuple[int, ...]:
        settings = (*COMMON, f"parallel.tp_size={tp_size}", "training.stop_after=2")
        arguments = (shards, tmp_path / str(tp_size), settings)
        ranks = rank_group(2).run(counts_of_micro_steps, *arguments)
        return tuple(map(sum, zip(*(count for rank in ranks for count in rank), strict=True)))

    alone = total(tp_size=1)
    assert total(tp_size=2) == alone
    assert min(alone) > 0
