"""Steps that are skipped because their loss or gradient is not finite: how they are counted, and
their effects.
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import training_on_ranks
from training.training_on_ranks import gradient_spoilt, loss_spoilt

PLAIN = (
    "data.workers=0",
    "training.dry_run=false",
    "training.steps=4",
    "training.task_weights={segmentation: 1}",
)


@pytest.fixture(scope="module")
def run(rank_group, shards):
    """Trains on two ranks. Returns the output of each."""
    return training_on_ranks.on_two_ranks(rank_group, shards, PLAIN)


def curve(output: Path, name: str) -> dict[int, float]:
    """The values of a curve by step."""
    with (output / f"csv_monitor/train_{name}.csv").open() as file:
        return {int(at) // 4: float(value) for at, value in csv.reader(file) if at != "step"}


@pytest.mark.parametrize("engine", ["zero0_fp32", "zero1_bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "mt_adamw"])
def test_a_gradient_that_is_not_finite_costs_what_a_loss_that_is_not_does(
    run, tmp_path, engine, optimizer
):
    clip = "null" if optimizer == "mt_adamw" else "1.0"
    settings = (f"engine={engine}", f"optimizer.name={optimizer}", f"optimizer.clip={clip}")
    loss = run(tmp_path / "loss", *settings, fault=partial(loss_spoilt, 2))
    gradient = run(tmp_path / "gradient", *settings, fault=partial(gradient_spoilt, 2))
    assert [rank["ended"] for rank in loss + gradient] == ["well"] * 4
    assert [rank["state"] for rank in loss] == [rank["state"] for rank in gradient]
    assert "step 2 is skipped, its loss is not finite (1 of at most 5)" in loss[0]["printed"]
    assert "step 2: the loss is not finite on rank 1 in " in loss[1]["printed"]
    assert "the loss is not finite on rank" not in loss[0]["printed"]
    message = "step 2 is skipped, its gradient is zero or not finite (1 of at most 5)"
    assert message in gradient[0]["printed"]
    assert "the loss is not finite on rank" not in gradient[0]["printed"]


def test_steps_left_out_are_counted_over_the_whole_run_whatever_it_is_interrupted_by(run, tmp_path):
    settings = ("training.skipped_steps=1",)
    first = run(tmp_path, *settings, "training.stop_after=2", fault=partial(loss_spoilt, 2))
    assert "(1 of at most 1)" in first[0]["printed"]
    index = json.loads((tmp_path / "checkpoints/step-00000002/index.json").read_text())
    assert index["skipped_steps"] == 1
    for rank in run(tmp_path, *settings, fault=partial(gradient_spoilt, 4)):
        assert rank["ended"].startswith(
            "training.skipped_steps: 2 step(s) were skipped, the last of them step 4, because "
            "their loss or gradient was not finite; "
        )


def test_a_step_left_out_drops_its_own_losses_and_no_others(run, tmp_path):
    fault = partial(loss_spoilt, 3)
    run(tmp_path / "each", "engine=demo", "training.log_every=1", fault=fault)
    run(tmp_path / "once", "engine=demo", "training.log_every=4", fault=fault)
    for name in ("image_loss", "auxiliary_loss", "segmentation_gradient_norm"):
        each_step = curve(tmp_path / "each", name)
        assert list(each_step) == [1, 2, 4]
        # All steps have equally many targets.
        assert curve(tmp_path / "once", name) == {4: pytest.approx(sum(each_step.values()) / 3)}
    assert list(curve(tmp_path / "each", "tokens_per_second")) == [1, 2, 3, 4]


class _Waits(TorchDispatchMode):
    """Counts how often the host reads a number from a tensor, which would synchronise with a
    GPU.
    """

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def waits(place: Any, shards: Path, output: Path, settings: tuple[str, ...]) -> int:
    with _Waits() as mode:
        ended = training_on_ranks.run(place, shards, output, (*PLAIN, *settings))["ended"]
    assert ended == "well"
    return mode.count


def test_the_host_waits_for_the_device_once_a_step_not_once_a_micro_step(
    rank_group, shards, tmp_path
):
    """In a dense model, since the gates of experts have their own synchronisation."""
    settings = ("training.steps=2", "model.feed_forward=dense", "engine=zero1_bf16")
    counts = [
        rank_group(2).run(
            waits, shards, tmp_path / str(size), (*settings, f"training.micro_batch={size}")
        )
        for size in (1, 2)
    ]
    assert counts[0] == counts[1]
