"""Checkpoints saved under one layout are resumed under another, with the optimizer's state, as if
the run had never stopped.
"""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from toy_model import MANIFEST, VOCABULARY, make_batch, make_recipe, make_sequences

from icl_moe.batch import collate
from icl_moe.data.schedule import RankSlice
from icl_moe.errors import InputError
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.deepspeed_moe import exported_name
from icl_moe.optim.parameter_groups import parameter_groups
from icl_moe.recipe import OptimizerSettings, ParallelSettings
from icl_moe.training import checkpoint, training_state
from icl_moe.training import engine as engine_module
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.initial_model import InitialModel

SAVED_AT, STEPS = 2, 4
RATE = 1e-3


@dataclass(frozen=True)
class Layout:
    """The layout of a toy run. model: settings of the toy model that differ from its defaults."""

    world: int = 2
    stage: int = 1
    ep_size: int = 1
    tp_size: int = 1
    bf16: bool = False
    model: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "1 rank": Layout(world=1, stage=1),
    "2 ranks, ZeRO 0, ep 2": Layout(stage=0, ep_size=2),
    "2 ranks, ZeRO 1, ep 2": Layout(stage=1, ep_size=2),
    "2 ranks, ZeRO 2": Layout(stage=2),
    "2 ranks, ZeRO 3": Layout(stage=3),
    "2 ranks, tp 2": Layout(stage=1, tp_size=2),
    "4 ranks, ZeRO 2, ep 2": Layout(world=4, stage=2, ep_size=2),
    "4 ranks, tp 2, ep 2": Layout(world=4, stage=1, ep_size=2, tp_size=2),
}


def train(
    place: Any,
    layout: Layout,
    optimizer: str,
    output: Path,
    stop: int,
    start_from: Path | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Resume from the newest checkpoint of `output`, or start from an exported model, train to step
    `stop` and save. Returns the losses of global batches and this rank's parameters.
    """
    recipe = replace(
        make_recipe(
            model={"feed_forward": "attributes", "gate_noise": True, "link": True, **layout.model}
        ),
        parallel=ParallelSettings(layout.ep_size, layout.tp_size),
        # A larger epsilon than usual, since Adam amplifies rounding errors to full steps if a
        # gradient is nearly zero.
        optimizer=OptimizerSettings(
            optimizer, learning_rate=RATE, epsilon=1e-6, clip=0.5 if optimizer == "adamw" else None
        ),
    )
    part = RankSlice.of(place.rank, place.world, recipe.training.global_batch, 1, layout.tp_size)
    config = {
        "zero_optimization": {"stage": layout.stage, "reduce_scatter": True},
        "bf16": {"enabled": layout.bf16},
    }
    initial = None if start_from is None else InitialModel.open(str(start_from))
    engine = TrainingEngine(recipe, MANIFEST, config, part, place, initial=initial)
    try:
        start = checkpoint.resume(engine.deepspeed, output)
        losses = [_step(engine, part, step) for step in range(start, stop)]
        assert checkpoint.save(engine.deepspeed, output, stop, keep=1)
        engine.model.config.save_pretrained(output / "model")
        return losses, {
            exported_name(name): parameter.detach().clone()
            for name, parameter in engine.model.named_parameters()
        }
    finally:
        engine.deepspeed.destroy()


def _step(engine: Any, part: RankSlice, step: int) -> float:
    task = ("segmentation", "captioning")[step % 2]
    sequences = make_sequences(task, part.ranks * part.micro_steps, seed=step)
    scale = len(sequences) / sum(float(s.loss_weights().sum()) for s in sequences)
    engine.begin_step(RATE, task, 0.5)
    total = torch.zeros(())
    for micro_step in range(part.micro_steps):
        torch.manual_seed(100 * step + 10 * micro_step + part.rank)
        sequence = sequences[micro_step * part.ranks + part.rank]
        loss = engine.backward(
            collate([sequence], VOCABULARY, task, loss_scale=scale), noise=(0, step)
        )
        engine.step()
        total += loss.total.detach().float() / part.micro_steps
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@pytest.fixture(scope="module")
def run(rank_group) -> Callable:
    """Trains under a layout. Returns the losses, which must agree on all ranks, and rank 0's
    parameters.
    """

    def train_all(layout: Layout, *arguments: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        results = rank_group(layout.world).run(train, layout, *arguments)
        assert len({tuple(losses) for losses, _ in results}) == 1
        return results[0]

    return train_all


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Optimizer -> a run of one rank."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        optimizer: run(LAYOUTS["1 rank"], optimizer, folder / optimizer, STEPS)
        for optimizer in ("adamw", "mt_adamw")
    }


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> dict[str, Path]:
    """Layout -> the folder of a run with a checkpoint after `SAVED_AT` steps of AdamW."""
    folders = {name: tmp_path_factory.mktemp("saved") / "run" for name in LAYOUTS}
    for name, folder in folders.items():
        run(LAYOUTS[name], "adamw", folder, SAVED_AT)
    return folders


def exported(run_folder: Path, to: Path) -> InContextDecoder:
    checkpoint.export(run_folder, to)
    return InContextDecoder.from_pretrained(to)


def assert_equal_parameters(
    model: InContextDecoder, expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        difference = (parameter.detach().float() - expected[name]).abs()
        # The true gradient of the keys' biases is zero: Adam follows rounding errors, and nothing
        # depends on them.
        if name.endswith("qkv.bias"):
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max() < tolerance, name


@pytest.mark.parametrize("resumed", LAYOUTS)
@pytest.mark.parametrize("written", LAYOUTS)
def test_a_run_goes_on_under_any_layout_as_if_it_had_never_stopped(
    run, uninterrupted, saved, tmp_path, written, resumed
):
    losses, parameters = uninterrupted["adamw"]
    shutil.copytree(saved[written], tmp_path / "run")
    assert run(LAYOUTS[resumed], "adamw", tmp_path / "run", STEPS)[0] == pytest.approx(
        losses[SAVED_AT:], abs=1e-5
    )
    assert_equal_parameters(exported(tmp_path / "run", tmp_path / "model"), parameters)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_starts_from_an_exported_model_under_any_layout(run, saved, tmp_path, layout):
    """Its weights are the model's, whole and in their places, before the first step."""
    wanted = dict(exported(saved["1 rank"], tmp_path / "initial").named_parameters())
    run(LAYOUTS[layout], "adamw", tmp_path / "run", 0, tmp_path / "initial")
    assert_equal_parameters(exported(tmp_path / "run", tmp_path / "model"), wanted, tolerance=1e-9)


@pytest.mark.parametrize(("stage", "ep_size"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_in_the_layout_that_saved_it_a_run_ends_in_the_same_files_byte_for_byte(
    run, tmp_path, stage, ep_size
):
    layout = Layout(stage=stage, ep_size=ep_size, model={"dropout": 0.1})
    whole, _ = run(layout, "mt_adamw", tmp_path / "whole", STEPS)
    halves = [run(layout, "mt_adamw", tmp_path / "halves", stop)[0] for stop in (SAVED_AT, STEPS)]
    assert halves[0] + halves[1] == whole
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def contents(run_folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (run_folder / f"checkpoints/step-{STEPS:08d}").iterdir()
    }


def test_task_balanced_adamw_goes_through_four_layouts_a_step_each(run, uninterrupted, tmp_path):
    names = ("2 ranks, ZeRO 0, ep 2", "4 ranks, tp 2, ep 2", "2 ranks, ZeRO 3", "2 ranks, tp 2")
    for stop, name in enumerate(names, start=1):
        losses, _ = run(LAYOUTS[name], "mt_adamw", tmp_path / "run", stop)
        assert losses == pytest.approx(uninterrupted["mt_adamw"][0][stop - 1 : stop], abs=1e-5)
    assert_equal_parameters(
        exported(tmp_path / "run", tmp_path / "model"), uninterrupted["mt_adamw"][1]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_gives_the_logits_of_the_whole_model(saved, tmp_path, layout):
    batch = make_batch("segmentation", 1, layout="padded")
    arguments = (
        batch.tokens_T[None],
        batch.positions_T[None],
        torch.ones_like(batch.tokens_T)[None],
        batch.links_T2[None],
    )
    with torch.no_grad():
        ours, expected = (
            exported(saved[name], tmp_path / name).forward_logits(*arguments)
            for name in (layout, "1 rank")
        )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stage", "ep_size"), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (3, 1)]
)
def test_a_checkpoint_is_twelve_bytes_a_parameter_in_equal_shares(run, tmp_path, stage, ep_size):
    """Four for the master weight and eight for the two moments; the largest files of two ranks have
    equal size.
    """
    run(Layout(stage=stage, ep_size=ep_size, model={"width": 96}), "adamw", tmp_path, 1)
    count = sum(
        parameter.numel() for parameter in exported(tmp_path, tmp_path / "exported").parameters()
    )
    folder = tmp_path / "checkpoints/step-00000001"
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(
        12 * count, rel=0.01
    )
    shares = [
        sum(path.stat().st_size for path in folder.glob(f"*-{rank:05d}.safetensors"))
        for rank in (0, 1)
    ]
    assert shares == pytest.approx([6 * count] * 2, rel=0.02)


@pytest.mark.parametrize(
    "resumed",
    [
        Layout(stage=0, bf16=True),
        Layout(stage=2, bf16=True),
        Layout(world=4, tp_size=2, ep_size=2, bf16=True),
        Layout(stage=3, bf16=True),
        Layout(),
    ],
    ids=["ZeRO 0", "ZeRO 2", "tp 2, ep 2", "ZeRO 3", "fp32"],
)
def test_in_bf16_a_run_goes_on_from_its_master_weights(run, tmp_path, resumed):
    """Within 5e-3 of the uninterrupted run in bf16, whose losses are about 7: bf16 has three
    digits. The same in fp32.
    """
    losses, _ = run(Layout(world=1, bf16=True), "adamw", tmp_path / "whole", STEPS)
    run(Layout(ep_size=2, bf16=True), "adamw", tmp_path / "run", SAVED_AT)
    assert run(resumed, "adamw", tmp_path / "run", STEPS)[0] == pytest.approx(
        losses[SAVED_AT:], abs=5e-3
    )


def test_the_momentum_of_another_optimizer_goes_on_too(rank_group, tmp_path):
    whole, _ = rank_group(1).run(train_with_momentum, LAYOUTS["1 rank"], tmp_path / "whole", STEPS)[
        0
    ]
    rank_group(2).run(
        train_with_momentum, LAYOUTS["2 ranks, ZeRO 0, ep 2"], tmp_path / "run", SAVED_AT
    )
    for losses, _ in rank_group(2).run(
        train_with_momentum, LAYOUTS["2 ranks, ZeRO 2"], tmp_path / "run", STEPS
    ):
        assert losses == pytest.approx(whole[SAVED_AT:], abs=1e-5)


def train_with_momentum(
    place: Any, layout: Layout, output: Path, stop: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    def sgd(_: Any, model: torch.nn.Module, norm: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(model, 0.0), momentum=0.9)

    with mock.patch.object(engine_module, "_build_optimizer", sgd):
        return train(place, layout, "adamw", output, stop)


@pytest.mark.parametrize(
    ("layout", "optimizer", "sentence"),
    [
        (Layout(), "mt_adamw", "holds the state of AdamW, but optimizer.name makes MTAdamW"),
        (
            Layout(model={"feed_forward": "dense"}),
            "adamw",
            "than the recipe (layers.1.feed_forward.down.bias is missing",
        ),
        (
            Layout(model={"layers": 2, "layers_with_experts": (1,)}),
            "adamw",
            "has the shape [32] there and is missing here",
        ),
        (
            Layout(model={"width": 64}),
            "adamw",
            "has the shape [32] there and has the shape [64] here",
        ),
    ],
    ids=["optimizer", "missing", "surplus", "shape"],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(
    rank_group, saved, layout, optimizer, sentence
):
    for refusal in rank_group(2).run(refused, layout, optimizer, saved["4 ranks, tp 2, ep 2"]):
        assert sentence in refusal


def refused(place: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as refusal:
        train(place, *arguments, STEPS)
    return str(refusal.value)


def test_where_one_rank_cannot_write_none_takes_the_checkpoint_for_saved(rank_group, tmp_path):
    assert rank_group(2).run(save_on_a_disk_that_fails, tmp_path) == [False, False]
    assert not list(tmp_path.rglob("complete.json"))


def save_on_a_disk_that_fails(place: Any, output: Path) -> bool:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = make_recipe()
    engine = TrainingEngine(
        recipe, MANIFEST, {}, RankSlice.of(place.rank, 2, recipe.training.global_batch, 1), place
    )
    with mock.patch.object(
        training_state, "save_file", full if place.rank == 1 else training_state.save_file
    ):
        return checkpoint.save(engine.deepspeed, output, 1, keep=1)
