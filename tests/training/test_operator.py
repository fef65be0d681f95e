"""What an operator sees of a run: curves, tables, pictures, and an early error for a batch that is
too large. None of it changes the run.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from training import training_on_ranks

from icl_moe.attributes import describe_attributes
from icl_moe.data.loader import MicroBatches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.evaluation.protocol import evaluate
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.settings import to_dict
from icl_moe.tasks import streams
from icl_moe.training.checkpoint import export

STEPS = 5  # Both tasks occur among them.
EVALUATED = 3  # After this step the run is evaluated and saved, and continues.
PLAIN = (
    f"training.steps={STEPS}",
    "data.workers=0",
    "training.seed=1",
    "training.dry_run=false",
    "training.micro_batch=2",
)
EVERYTHING = (
    "training.dry_run=true",
    f"training.evaluate_every={EVALUATED}",
    f"training.save_every={EVALUATED}",
    "training.evaluate_episodes=3",
    "training.gradient_report_every=2",
    "training.deterministic=true",
)


LAYOUTS = {
    "zero0": ("engine=zero0_fp32",),
    "zero3": ("engine=zero3_fp32.json",),
    "experts over ranks": ("engine=zero1_fp32", "parallel.ep_size=2"),
    "matrices over ranks": ("engine=zero1_fp32", "parallel.tp_size=2"),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path) -> tuple[str, ...]:
    """Settings of a layout in which a rank does not hold all that the engine trains, or in which
    ZeRO 1 distributes it.
    """
    engine = tmp_path / "zero3_fp32.json"
    engine.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    return tuple(
        setting.replace("zero3_fp32.json", str(engine)) for setting in LAYOUTS[request.param]
    )


@pytest.fixture(scope="session")
def observed(tmp_path_factory, rank_group, shards) -> tuple[Path, list[dict[str, str]]]:
    """A run of two ranks with all reports enabled: its folder and the output of the ranks."""
    output = tmp_path_factory.mktemp("observed") / "run"
    return output, rank_group(2).run(
        training_on_ranks.run, shards, output, (*PLAIN, *EVERYTHING, f"data.validation={shards}")
    )


def curve(output: Path, name: str) -> dict[int, float]:
    """Samples seen -> a figure of DeepSpeed's CSV monitor; empty if it has none."""
    path = output / "csv_monitor" / f"{name.replace('/', '_')}.csv"
    if not path.is_file():
        return {}
    with path.open() as file:
        return {
            int(samples): float(value) for samples, value in csv.reader(file) if samples != "step"
        }


def step_tasks(shards: Path) -> list[str]:
    schedule = Schedule(ShardSet(shards).manifest.samples, 4, seed=1)
    return [schedule.task(step) for step in range(STEPS)]


def test_nothing_that_is_reported_changes_the_run(observed, rank_group, shards, tmp_path):
    plain = rank_group(2).run(training_on_ranks.run, shards, tmp_path / "run", PLAIN)
    assert [rank["ended"] for rank in plain + observed[1]] == ["well"] * 4
    assert [rank["state"] for rank in plain] == [rank["state"] for rank in observed[1]]
    assert curve(tmp_path / "run", "train/gradient_norm") == curve(
        observed[0], "train/gradient_norm"
    )


def test_an_observed_run_that_was_interrupted_goes_on_bit_for_bit(
    observed, rank_group, shards, tmp_path
):
    settings = (*PLAIN, *EVERYTHING, f"data.validation={shards}")
    rank_group(2).run(training_on_ranks.run, shards, tmp_path, (*settings, "training.stop_after=2"))
    with (tmp_path / "gradients.csv").open("a") as file:
        # A run that is killed after its last checkpoint leaves the file like this.
        file.write("3,captioning,norm,1,1\n4,segm")
    resumed = rank_group(2).run(training_on_ranks.run, shards, tmp_path, settings)
    assert [rank["state"] for rank in resumed] == [rank["state"] for rank in observed[1]]
    assert gradient_rows(tmp_path) == gradient_rows(observed[0])


def test_nor_does_it_in_other_layouts(rank_group, shards, tmp_path, layout):
    settings = (*PLAIN, *layout, "training.micro_batch=1")
    plain = rank_group(2).run(training_on_ranks.run, shards, tmp_path / "plain", settings)
    watched = (*settings, *EVERYTHING, f"data.validation={shards}")
    observed = rank_group(2).run(training_on_ranks.run, shards, tmp_path / "observed", watched)
    assert [rank["ended"] for rank in plain + observed] == ["well"] * 4
    assert [rank["state"] for rank in plain] == [rank["state"] for rank in observed]
    assert "evaluation of captioning  loss" in observed[0]["printed"]


def test_deterministic_operations_are_asked_for_in_the_run_alone(
    observed, rank_group, shards, tmp_path
):
    assert [rank["deterministic"] for rank in observed[1]] == ["{True}"] * 2
    after = rank_group(2).run(
        training_on_ranks.run, shards, tmp_path, (*PLAIN, "training.stop_after=1")
    )
    assert [rank["deterministic"] for rank in after] == ["{False}"] * 2


def test_each_task_has_its_own_curves(observed, shards):
    output, _ = observed
    tasks = step_tasks(shards)
    assert set(tasks) == {"segmentation", "captioning"}
    whole = {
        "segmentation": curve(output, "train/image_loss"),
        "captioning": curve(output, "train/text_loss"),
    }
    for task, modality in (("segmentation", "image"), ("captioning", "text")):
        samples = [4 * (step + 1) for step, name in enumerate(tasks) if name == task]
        assert curve(output, f"train/{task}/{modality}_loss") == {
            at: whole[task][at] for at in samples
        }
        norms = curve(output, "train/gradient_norm")
        assert curve(output, f"train/{task}/gradient_norm") == {at: norms[at] for at in samples}
    assert curve(output, "train/segmentation/text_loss") == {}
    names = {
        path.name.removesuffix(".csv").split("_")[0] for path in (output / "csv_monitor").iterdir()
    }
    assert names == {"train", "eval"}  # The engine itself writes nothing else.


def test_tensorboard_has_the_curves_the_table_and_the_pictures(observed):
    output, _ = observed
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for task in ("segmentation", "captioning"):
        for name in (f"train/{task}/auxiliary_loss", f"eval/{task}/loss"):
            assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(
                curve(output, name), rel=1e-6
            )
        picture = Image.open(output / f"samples/step-0000000{EVALUATED}/{task}.png")
        (event,) = events.Images(f"eval/{task}")
        assert (event.width, event.height) == picture.size
        assert len(np.unique(np.asarray(picture))) > 10
    assert "experts/text_summary" in events.Tags()["tensors"]


def test_the_progress_line_says_it_all_once(observed):
    main, other = (rank["printed"].splitlines() for rank in observed[1])
    assert other == []
    lines = [line for line in main if line.startswith(f"step {STEPS}/{STEPS} ")]
    assert len(lines) == 1
    for part in (
        "loss",
        "auxiliary loss",
        "gradient norm",
        "tokens per second",
        "episodes per second",
        "ETA",
    ):
        assert part in lines[0]
    assert "utilisation" not in lines[0]  # The peak of this CPU is unknown.
    assert len(main) == STEPS + 2  # One line per step, and one per evaluated task.


def test_the_table_of_experts_is_what_the_exported_models_gate_chooses(observed, tmp_path):
    export(observed[0], tmp_path / "model")
    text = (observed[0] / "experts.txt").read_text()
    assert text.startswith(f"after {STEPS} steps\n")
    decoder = InContextDecoder.from_pretrained(tmp_path / "model")
    gate = decoder.layers[1].feed_forward.gate
    for attributes in streams(decoder.sequence_format):
        probabilities, experts = gate.probabilities((attributes,))[0].topk(2)
        weights = (probabilities / probabilities.sum()).tolist()
        chosen = ", ".join(
            f"{expert} ({weight:.2f})"
            for expert, weight in zip(experts.tolist(), weights, strict=True)
        )
        assert any(
            line.split("  ")[0] == "1"
            and describe_attributes(attributes) in line
            and line.endswith(chosen)
            for line in text.splitlines()
        )


def test_evaluation_while_training_scores_as_the_evaluation_of_the_exported_model(
    observed, shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # Without Java, like the scores during training.
    export(observed[0] / f"checkpoints/step-0000000{EVALUATED}", tmp_path / "model")
    done = evaluate(tmp_path / "model", shards, tmp_path / "report", shots=(1,), limit=3)
    metrics = done.to_json()
    at = 4 * EVALUATED
    (masks, *_), (captions, *_) = (
        metrics["tasks"][task]["rows"] for task in ("segmentation", "captioning")
    )
    for name in ("miou", "mean_iou", "mae"):
        assert curve(observed[0], f"eval/segmentation/{name}") == {at: pytest.approx(masks[name])}
    assert curve(observed[0], "eval/captioning/cider") == {at: pytest.approx(captions["cider"])}
    for task in ("segmentation", "captioning"):
        assert curve(observed[0], f"eval/{task}/loss") == {
            at: pytest.approx(metrics["tasks"][task]["held_out"]["loss"], rel=1e-5)
        }


def test_the_predictions_of_an_evaluation_are_kept_beside_its_pictures(observed):
    folder = observed[0] / f"samples/step-0000000{EVALUATED}"
    assert {path.name for path in folder.iterdir()} == {
        "predictions.jsonl",
        "segmentation.png",
        "captioning.png",
    }
    header, *lines = (folder / "predictions.jsonl").read_text().splitlines()
    assert json.loads(header)["step"] == EVALUATED
    assert len(lines) == 2 * 3  # Three episodes of each task.


def gradient_rows(output: Path) -> list[dict[str, str]]:
    with (output / "gradients.csv").open() as file:
        return list(csv.DictReader(file))


def test_gradients_are_reported_for_the_first_step_of_a_task_in_each_window(observed, shards):
    output, _ = observed
    tasks = step_tasks(shards)
    due = [step for step in range(STEPS) if tasks[step] not in tasks[step // 2 * 2 : step]]
    rows = gradient_rows(output)
    assert list(dict.fromkeys((int(row["step"]), row["task"]) for row in rows)) == [
        (step + 1, tasks[step]) for step in due
    ]
    for step in due:
        mine = [row for row in rows if int(row["step"]) == step + 1]
        assert math.fsum(float(row["normalised"]) ** 2 for row in mine) == pytest.approx(
            1, rel=1e-4
        )
        norm = math.sqrt(math.fsum(float(row["norm"]) ** 2 for row in mine))
        assert norm == pytest.approx(curve(output, "train/gradient_norm")[4 * (step + 1)], rel=1e-4)


def test_reported_gradients_are_those_of_plain_autograd(rank_group, shards, tmp_path, layout):
    smooth = (
        "model.dropout=0",
        "model.gate_noise=false",
        "training.gradient_report_every=1",
        "training.steps=1",
        "optimizer.clip=0.01",
    )
    arguments = (*PLAIN, *smooth, *layout, "training.micro_batch=1")
    rank_group(2).run(training_on_ranks.run, shards, tmp_path, arguments)
    recipe, shard_set = training_on_ranks.load(shards, tmp_path, *arguments), ShardSet(shards)
    dataset = MicroBatches(
        shard_set,
        Schedule(shard_set.manifest.samples, 4, seed=1),
        RankSlice.of(0, 1, 4, 4),
        "packed",
        0.0,
    )
    decoder = InContextDecoder(
        DecoderConfig.from_recipe(recipe, format=to_dict(shard_set.manifest.format))
    )
    initialise(decoder, seed=1)
    decoder(dataset[0]).total.backward()
    expected: dict[str, float] = {}
    for name, parameter in decoder.named_parameters():
        part = ".".join(name.split(".")[:3]) if name.startswith("layers") else name.split(".")[0]
        expected[part] = expected.get(part, 0.0) + (
            0.0 if parameter.grad is None else parameter.grad.square().sum().item()
        )
    found = {row["part"]: float(row["norm"]) for row in gradient_rows(tmp_path)}
    assert found == pytest.approx(
        {part: math.sqrt(square) for part, square in expected.items()}, rel=1e-4
    )


def test_a_micro_batch_that_does_not_fit_ends_the_run_at_once_with_one_that_does(
    rank_group, shards, tmp_path
):
    settings = (
        *PLAIN,
        "training.dry_run=true",
        "training.global_batch=16",
        "training.micro_batch=8",
    )
    ranks = rank_group(2).run(training_on_ranks.run, shards, tmp_path, settings, 3)
    (sentence,) = (rank["ended"] for rank in ranks if rank["ended"] != "exit code 2")
    assert sentence.startswith(
        "training.micro_batch: 8 of the longest segmentation episodes do not fit into the memory "
        "of this machine (rank "
    )
    assert sentence.endswith("); set training.micro_batch=2, which was tried and fits.")
    assert "step" not in "".join(rank["printed"] for rank in ranks)
    assert not (tmp_path / "checkpoints").exists()


def test_without_any_micro_batch_that_fits_other_ways_are_named(rank_group, shards, tmp_path):
    settings = (
        *PLAIN,
        "training.dry_run=true",
        "training.global_batch=4",
        "training.micro_batch=2",
    )
    ranks = rank_group(2).run(training_on_ranks.run, shards, tmp_path, settings, 0)
    (sentence,) = (rank["ended"] for rank in ranks if rank["ended"] != "exit code 2")
    assert "no smaller one does: set training.activation_checkpointing=true" in sentence


class _Reserved(TorchDispatchMode):
    """Counts the numbers of empty tensors that hold two of something, as of two moments."""

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.empty.memory_format:
            shape = list(args[0])
            self.count += math.prod(shape) if len(shape) > 1 and shape[0] == 2 else 0
        return function(*args, **(kwargs or {}))


def reserved(place: Any, *arguments: Any) -> int:
    with _Reserved() as mode:
        assert training_on_ranks.run(place, *arguments)["ended"] == "well"
    return mode.count


def test_memory_is_reserved_for_the_state_of_a_new_optimizer_and_not_for_one_that_is_there(
    rank_group, shards, tmp_path
):
    def of_a_run_to(step: int) -> list[int]:
        settings = (*PLAIN, "training.dry_run=true", f"training.stop_after={step}")
        return rank_group(2).run(reserved, shards, tmp_path, settings)

    new, resumed = of_a_run_to(1), of_a_run_to(2)
    weights = load_file(tmp_path / "checkpoints/step-00000001/weight-00000.safetensors")
    assert new[0] >= 2 * sum(weight.numel() for weight in weights.values())
    assert resumed == [0, 0]


def test_evaluation_needs_validation_shards_of_the_same_kind(shards, tmp_path):
    with pytest.raises(ValueError, match=r"training\.evaluate_every needs data\.validation"):
        training_on_ranks.load(shards, tmp_path, "training.evaluate_every=5")
    other = tmp_path / "other"
    other.mkdir()
    for file in shards.iterdir():
        (other / file.name).symlink_to(file)
    (other / "manifest.json").unlink()
    (other / "manifest.json").write_text(
        json.dumps(
            json.loads((shards / "manifest.json").read_text()) | {"image_tokenizer": "0ther"}
        )
    )
    recipe = training_on_ranks.load(
        shards, tmp_path, "training.evaluate_every=5", f"data.validation={other}"
    )
    with pytest.raises(
        ValueError,
        match=r"data\.validation: .*other has image tokenizer 0ther, but .* build both in the same",
    ):
        training_on_ranks.open_checked(recipe, 2)


def test_ranks_that_wait_for_rank_0_beat_when_it_does_and_stop_when_it_stops(rank_group):
    main, waiting = rank_group(2).run(training_on_ranks.beats_while_rank_0_works, 2)
    assert main == 3
    # Its own first one, one for each value of rank 0's beat that it saw, and among those possibly
    # the value that an earlier run of this group of ranks left.
    assert 2 <= waiting <= 1 + main + 1
