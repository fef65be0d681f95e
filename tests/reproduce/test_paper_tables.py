"""The paper's tables as data: every row exists, is what the published table has, and fits its
recipes.
"""

import json
from dataclasses import replace

import pytest

from icl_moe.cli import main
from icl_moe.errors import InputError
from icl_moe.evaluation.published import FIGURES, beside, published_tables
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce import pipeline
from icl_moe.reproduce.cost import cost_of, describe_cost, format_of
from icl_moe.reproduce.output import write_table
from icl_moe.reproduce.pipeline import DATA_SETS, reproduce
from icl_moe.reproduce.tables import EPISODES, SCALES, TABLES
from icl_moe.settings import load_recipe
from preprocessing.recipe import DataRecipe

MADE = {(name, scale): make(scale) for name, make in TABLES.items() for scale in SCALES}
RUNS = {
    (scale, run.name): run
    for (_, scale), table in MADE.items()
    for row in table.rows
    for run in row.runs
}


@pytest.mark.parametrize("name", TABLES)
def test_both_scales_have_the_rows_of_the_published_table(name):
    demo, paper = (MADE[name, scale] for scale in SCALES)
    assert [row.name for row in demo.rows] == [row.name for row in paper.rows]
    assert {row.name for row in demo.rows} == set(published_tables()[name].rows)


def test_runs_and_shards_of_one_name_are_the_same():
    for scale in SCALES:
        runs = [
            run
            for (_, scale_of), table in MADE.items()
            if scale_of == scale
            for row in table.rows
            for run in row.runs
        ]
        shards = [folder for run in runs for folder in (run.trained, run.evaluated)]
        for made in (runs, shards):
            assert len({folder.name for folder in made}) == len(set(made))


@pytest.mark.parametrize(("scale", "name"), RUNS)
def test_a_run_fits_its_recipes(scale, name):
    run = RUNS[scale, name]
    recipe = load_recipe(TrainingRecipe, run.recipe, run.settings)
    for shards in (run.trained, run.evaluated):
        data = load_recipe(DataRecipe, shards.recipe, [*shards.settings], package="preprocessing")
        assert data.vocabulary == recipe.vocabulary
        format = data.sequence_format((data.image_size // (8 if scale == "demo" else 16)) ** 2)
        # A model that writes masks in one pass reads more examples than fit in groups.
        grouped = recipe.training.mask_corruption and recipe.training.loss_on == "query"
        if shards is run.trained or not grouped:
            assert format.length(data.examples + 1) == recipe.model.positions
        assert max(run.shots) <= data.examples or (shards is run.trained and grouped)
        if scale == "paper":
            assert format_of(run, recipe) == (format, data.examples)


@pytest.mark.parametrize(("scale", "name"), RUNS)
def test_a_run_is_evaluated_on_the_tasks_of_its_figures_alone(scale, name):
    run = RUNS[scale, name]
    scores = [
        s
        for (_, scale_of), t in MADE.items()
        if scale_of == scale
        for row in t.rows
        for s in row.scores
    ]
    tasks = {score.task for score in scores if score.run == run}
    evaluated = {t for t in EPISODES if f"{t}=null" not in run.evaluated.settings}
    assert evaluated == tasks


def test_the_cost_counts_the_queries_and_episodes_of_the_tasks_of_each_run():
    """Table 2: three models and three folders of captions alone, each query asked twice."""
    _, notes = describe_cost(MADE["table2", "paper"].rows)
    assert "up to 12,000 queries, those with swapped examples too" in " ".join(notes)
    (disk,) = [note for note in notes if note.startswith("Disk")]
    shards = 3 * 460_000 * 14_000 / 1e9
    assert shards < int(disk.split()[2]) < 2.5 * shards and "3 shard folder(s)" in disk


def test_the_papers_model_costs_what_its_arithmetic_says():
    """914 MFLOP a token of segmentation with experts; 20 epochs of 280,000 masks."""
    cost = cost_of(RUNS["paper", "table3_segmentation_alone"])
    assert cost.steps == 10_900
    assert cost.tokens == 10_900 * 512 * 2060
    sparse = cost_of(RUNS["paper", "paper_256"])
    assert sparse.parameters == 324_458_496 + 1005 * 768
    steps = load_recipe(TrainingRecipe, "paper_256").training.steps
    assert sparse.steps == steps
    assert 0.5 < sparse.tokens / (steps * 512 * 2060) < 1.0
    assert 700e6 < cost.flops / cost.tokens < 914e6


def test_paper_scale_says_what_it_costs_and_asks_first(tmp_path, capsys):
    with pytest.raises(InputError, match=r"11 of 11 files and folders of .* are missing"):
        reproduce("table2", "paper", tmp_path / "out", tmp_path)
    printed = capsys.readouterr().out
    assert "hours, 8 x H100" in printed and "MFU" in printed and "GB" in printed
    assert "published at https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip" in printed
    for name in DATA_SETS:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match="add --yes to start it"):
        reproduce("table2", "paper", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_each_command_once_and_does_nothing(tmp_path, capsys):
    words = ["reproduce", "table3", "--scale", "demo", "--rows", "dense,gshard", "--dry-run"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 8  # Both rows have the same shards.
    assert sum("model.feed_forward=token" in line for line in lines) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_whose_recipe_has_changed_is_not_taken_for_the_same(tmp_path):
    """Another comment is no change."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {steps: 5}\n")
    run = replace(RUNS["demo", "both"], recipe=str(recipe))
    line = pipeline._Line("demo", tmp_path / "out", tmp_path)
    line._claim(run)
    (line.folder(run) / "evaluation").mkdir()
    (line.folder(run) / "evaluation/metrics.json").write_text("{}")
    recipe.write_text("training: {steps: 5}  # Few.\n")
    line._claim(run)
    assert line.metrics(run) == {}, "it is finished"
    recipe.write_text("training: {steps: 6}\n")
    assert line.metrics(run) is None
    with pytest.raises(InputError, match="holds a run of other settings; choose another --out"):
        line._claim(run)


def test_a_row_that_there_is_not_is_named(tmp_path, capsys):
    words = ["reproduce", "table3", "--scale", "demo", "--rows", "gshart", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "table3 has no row 'gshart' (did you mean 'gshard'?); its rows are single, dense" in (
        capsys.readouterr().err
    )


def test_a_table_has_our_figures_beside_the_published_ones(tmp_path):
    row = {"prediction": "model", "shots": 1, "name": "1 example"}
    masks = {"miou": 0.25, "mae": 0.125, "mean_iou": 0.2}
    captions = {"bleu": [0.4, 0.3, 0.2, 0.1], "cider": 0.5, "meteor": None}
    copied = {"prediction": "first example", "miou": 0.9}
    metrics = {
        "tasks": {
            "segmentation": {
                "rows": [copied, row | masks | {"control": "shuffled"}, row | masks],
                "swapped": [row | {"flips": 0.75}],
            },
            "captioning": {"rows": [row | captions], "swapped": []},
        }
    }
    table = MADE["table3", "demo"]
    written = write_table(tmp_path, table, {"table3_gshard": metrics})
    assert written.head == [
        "row", "mIoU", "CIDEr", "flips, masks", "published mIoU", "published CIDEr"
    ]  # fmt: skip
    rows = {line[0]: line[1:] for line in written.rows}
    assert rows["all tasks, GShard experts"] == ["25.00", "50.0", "75.0", "40.48", "66.5"]
    assert rows["all tasks, dense"] == ["–", "–", "–", "21.74", "77.3"]
    page = (tmp_path / "table.html").read_text()
    assert '<td>25.00</td><td>50.0</td><td>75.0</td><td class="published">40.48</td>' in page
    assert "cannot be compared with the published ones" in page
    text = (tmp_path / "table.md").read_text()
    assert "| 25.00 | 50.0 | 75.0 | *40.48* | *66.5* |" in text
    values = json.loads((tmp_path / "table.json").read_text())
    by_name = {each["name"]: each for each in values["rows"]}
    assert by_name["gshard"]["measured"]["mae"] == 0.125
    assert by_name["gshard"]["published"] == {"miou": 40.48, "cider": 66.5}
    assert "2k Visual Genome regions" in values["published_protocol"]


def test_published_figures_have_known_names_a_source_and_a_protocol():
    for table in published_tables().values():
        assert table.source and table.protocol
        for row in table.rows.values():
            assert row.figures.keys() <= FIGURES.keys()
            assert {*row.unverified} <= row.figures.keys()
    (systems,) = [table for table in beside("segmentation") if table.address is None]
    cells = dict(zip(systems.table().head, systems.table().rows[1], strict=True))
    assert cells == {
        "system": "SegGPT", "COCO-20i": "56.1", "Pascal-5i": "", "FSS-1000": "85.6?",
        "LVIS-92i": "18.6",
    }  # fmt: skip
