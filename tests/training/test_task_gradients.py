"""The gradients of tasks at a checkpoint equal those of plain autograd, and the figure of them has
every number.
"""

import csv
import json
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import training_on_ranks
from PIL import Image
from torch import Tensor

from icl_moe.canvas import wrap
from icl_moe.data.loader import MicroBatches
from icl_moe.data.schedule import RankSlice
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.figures import FIGURES
from icl_moe.reproduce.gradients import Measured, measure, write_gradients
from icl_moe.training import training_state
from icl_moe.training.checkpoint import whole_checkpoints
from icl_moe.training.preflight import make_schedule
from icl_moe.training.task_gradients import WHOLE, task_gradients

SETTINGS = (
    "training.steps=4",
    "training.save_every=2",
    "training.gradient_report_every=2",
    "training.dry_run=false",
    "training.micro_batch=2",
    "training.mask_corruption=true",
    "data.workers=0",
)


@pytest.fixture(scope="module")
def trained(shards, rank_group, tmp_path_factory) -> tuple[Path, TrainingRecipe]:
    output = tmp_path_factory.mktemp("gradients") / "run"
    rank_group(2).run(training_on_ranks.run, shards, output, SETTINGS)
    return output, training_on_ranks.load(shards, output, *SETTINGS)


def _plain(folder: Path, recipe: TrainingRecipe, steps: list[int]) -> dict[str, Tensor]:
    """The mean gradient of these steps' global batches, each as one micro-batch."""
    config = DecoderConfig.from_pretrained(folder.parent.parent / "model")
    decoder = InContextDecoder(config, auxiliary_weight=0.0).eval()
    decoder.load_state_dict(training_state.read_weights(folder, config)[0])
    shards = ShardSet(recipe.data.shards)
    part = RankSlice.of(0, 1, 4, 4)
    schedule = make_schedule(recipe, shards.manifest)
    dataset = MicroBatches(shards, schedule, part, "packed", 0.0, "all", True)
    for step in steps:
        decoder(dataset[step]).total.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad / len(steps)
        for name, p in decoder.named_parameters()
    }


def _cosine(a: dict[str, Tensor], b: dict[str, Tensor], begins: str = "") -> float:
    flat = [torch.cat([g[n].flatten() for n in g if n.startswith(begins)]) for g in (a, b)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def test_gradients_at_a_checkpoint_are_those_of_plain_autograd(trained):
    output, recipe = trained
    folder = whole_checkpoints(output)[0]
    found = task_gradients(recipe, folder, batches=4, device="cpu")
    assert (found.step, found.episodes) == (2, 16)
    schedule = make_schedule(recipe, ShardSet(recipe.data.shards).manifest)
    steps = {
        task: [t for t in range(2, 200) if schedule.task(t) == task][:4] for task in found.norms
    }
    groups = {
        task: [_plain(folder, recipe, [step]) for step in of_task]
        for task, of_task in steps.items()
    }
    for task, of_task in groups.items():
        cosines = [_cosine(a, b) for a, b in combinations(of_task, 2)]
        assert found.within[task][WHOLE] == pytest.approx(sum(cosines) / 6, abs=1e-4)
        mean = torch.cat([sum(g[name] for g in of_task).flatten() / 4 for name in of_task[0]])
        assert found.norms[task][WHOLE] == pytest.approx(float(mean.norm()), rel=1e-3)
    ((tasks, between),) = found.between.items()
    for part in ("layers.0.attention", "layers.1.feed_forward"):
        expected = [_cosine(a, b, f"{part}.") for a, b in product(*(groups[t] for t in tasks))]
        assert between[part] == pytest.approx(sum(expected) / 16, abs=1e-4)


def test_the_figure_has_every_number(trained, tmp_path):
    output, recipe = trained
    dense = measure("dense", output, recipe, batches=4)
    models = [dense, replace(dense, name="attribute experts")]
    assert [at.step for at in models[0].at] == [2, 4]
    table = write_gradients(tmp_path, FIGURES["figure6"]("demo"), models)
    assert [line[:2] for line in table.rows] == [
        [name, step] for name in ("dense", "attribute experts") for step in ("2", "4")
    ]
    picture = Image.open(tmp_path / "figure.png")
    assert picture.width > picture.height > 1000
    values = json.loads((tmp_path / "figure.json").read_text())
    (first, _) = values["models"][0]["checkpoints"]
    (between,) = first["cosines_between"].values()
    assert f"{between[WHOLE]:.3f}" == table.rows[0][2]
    with (tmp_path / "figure.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (output / "gradients.csv").open() as file:
        report = list(csv.DictReader(file))
    assert sum(row["what"] == "normalised" for row in rows) == 2 * len(report)
    page = (tmp_path / "figure.html").read_text()
    assert "data:image/png;base64" in page and "within segmentation" in page
    assert "table3_dense_mt" in page


def test_attention_over_training_is_the_root_of_its_squares():
    rows = [
        {"step": "1", "task": "a", "part": f"layers.{n}.attention", "normalised": str(value)}
        for n, value in enumerate((0.3, 0.4))
    ]
    assert Measured("m", rows, []).over_training("a") == [(1, pytest.approx(0.5))]


def test_a_run_without_a_report_is_named(trained, tmp_path):
    _, recipe = trained
    with pytest.raises(InputError, match=r"gradients\.csv is missing; delete .* to train that"):
        measure("dense", tmp_path, recipe)


def test_long_texts_are_wrapped_and_cut_off_with_an_ellipsis():
    lines = wrap("a brown dog that lies on the grass " * 5, 120, 3, 12)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert wrap("a dog", 120, 3, 12) == ["a dog"]
    assert wrap("x" * 100, 60, 2, 12)[0].endswith("…")
