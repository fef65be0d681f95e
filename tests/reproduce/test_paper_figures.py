"""The paper's figures as data: what they are of, and what the command does before it starts."""

import json
from pathlib import Path

import pytest

from icl_moe.cli import main
from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.figures import FIGURES
from icl_moe.reproduce.pipeline import reproduce
from icl_moe.reproduce.tables import SCALES, TABLES
from icl_moe.settings import load_recipe
from preprocessing.recipe import DataRecipe

MADE = {(name, scale): make(scale) for name, make in FIGURES.items() for scale in SCALES}


@pytest.mark.parametrize(("name", "scale"), MADE)
def test_a_figure_is_of_runs_of_a_table(name, scale):
    figure = MADE[name, scale]
    table = TABLES["table3" if name == "figure6" else "table4"](scale)
    assert set(figure.runs) <= {run for row in table.rows for run in row.runs}
    assert figure.notes and name.removeprefix("figure") in figure.title
    for run in figure.runs if name == "figure6" else ():
        training = load_recipe(TrainingRecipe, run.recipe, run.settings).training
        assert training.gradient_report_every and training.sampling == "unmixed"


@pytest.mark.parametrize("scale", SCALES)
def test_queries_out_of_domain_have_the_format_of_the_model(scale):
    for name in ("figure7", "figure8"):
        figure = MADE[name, scale]
        (run,) = figure.runs
        trained, other = (
            load_recipe(DataRecipe, each.recipe, [*each.settings], package="preprocessing")
            for each in (run.trained, figure.elsewhere.shards)
        )
        assert trained.sequence_format(64) == other.sequence_format(64)
        assert trained.synthetic.world != other.synthetic.world or scale == "paper"


def _printed(capsys, tmp_path: Path, *words: str) -> list[str]:
    out = tmp_path / "out"
    assert main(["reproduce", *words, "--dry-run", "--out", str(out)]) == 0
    assert not out.exists()
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_prints_the_stages_that_a_figure_needs(tmp_path, capsys):
    lines = _printed(capsys, tmp_path, "figure6", "--scale", "demo")
    assert len(lines) == 3 and sum("deepspeed" in line for line in lines) == 2
    lines = _printed(capsys, tmp_path, "figure9", "--scale", "demo")
    assert lines == _printed(capsys, tmp_path, "table4", "--scale", "demo")
    more = _printed(capsys, tmp_path, "figure7", "--scale", "demo")
    assert more[:-2] == lines and "synthetic.world=shapes" in more[-2]
    assert more[-2:] == _printed(capsys, tmp_path, "figure8", "--scale", "demo")[-2:]
    paper = _printed(capsys, tmp_path, "figure8", "--scale", "paper", "--data", "sets")
    assert "icl-moe episodes paper_vg_unseen --data sets/visual_genome" in paper[-3]
    assert "episodes_data=sets/visual_genome" in paper[-2]
    assert paper[-1].startswith("icl-moe evaluate") and "--shots 1 " in paper[-1]


def test_a_figure_has_no_rows_and_paper_scale_asks_first(tmp_path, capsys):
    with pytest.raises(InputError, match="--rows chooses rows of a table; figure9 is a figure"):
        reproduce("figure9", "demo", tmp_path / "out", rows=["ours"])
    with pytest.raises(InputError, match=r"12 of 12 files and folders of .* are missing"):
        reproduce("figure7", "paper", tmp_path / "out", tmp_path)
    printed = capsys.readouterr().out
    assert "lvis_v1_val.json    published at" in printed and "hours, 8 x H100" in printed


@pytest.mark.slow
def test_a_figure_is_trained_evaluated_and_drawn_and_then_not_again(tmp_path, run_command):
    program = Path(__file__).with_name("tiny_figures.py")
    out = tmp_path / "out"
    done = run_command(["python", program, out], timeout=500)
    assert done.returncode == 0, done.stdout
    for name in ("figure6", "figure7"):
        values = json.loads((out / name / "figure.json").read_text())
        assert values["says"] and values["notes"]
        assert (out / name / "figure.png").is_file() and (out / name / "figure.html").is_file()
    assert [each["queries"] for each in values["sets"]] == [4, 4]
    again = run_command(["python", program, out], timeout=200)
    assert "evaluation_shapes is finished." in again.stdout
    assert "step 1/" not in again.stdout and "drawing train" not in again.stdout
