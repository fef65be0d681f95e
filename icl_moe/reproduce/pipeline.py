"""Builds, trains, exports and evaluates the rows of a table, and fills it; and the same for the
runs that a figure is of, which it draws.

OUT/shards/NAME      the shards, which rows and tables with the same data share
OUT/runs/NAME        a run: run/ (checkpoints), model/ (the export), evaluation/, and
                     evaluation_SHARDS/ of queries that only a figure shows
OUT/TABLE            table.json, table.md and table.html, written anew after every row
OUT/FIGURE           figure.png, figure.html, figure.json and figure.csv
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError
from icl_moe.evaluation.published import published_tables
from icl_moe.files import write_whole
from icl_moe.inputs import read_json
from icl_moe.locks import locked
from icl_moe.outputs import output_folder, writing
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.cost import describe_cost
from icl_moe.reproduce.figures import FIGURES, Elsewhere, PaperFigure
from icl_moe.reproduce.output import write_table
from icl_moe.reproduce.qualitative import Evaluated, open_evaluation, write_pictures
from icl_moe.reproduce.tables import TABLES, PaperTable, Row, Run, Scale, Shards
from icl_moe.settings import find_recipe, load_recipe, read_recipe
from icl_moe.stages import ON_CPU, Command, launch, verb
from icl_moe.tables import Table, as_text

RANKS_OF_THE_DEMO = 2

_COCO = "http://images.cocodataset.org"
_ANNOTATIONS = f"{_COCO}/annotations/annotations_trainval2017.zip"
_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
_TOKENIZER = "vqgan_imagenet_f16_1024"

DATA_SETS = {
    "coco/annotations/instances_train2017.json": _ANNOTATIONS,
    "coco/annotations/instances_val2017.json": _ANNOTATIONS,
    "coco/train2017": f"{_COCO}/zips/train2017.zip",
    "coco/val2017": f"{_COCO}/zips/val2017.zip",
    "visual_genome/region_descriptions.json": f"{_GENOME}/region_descriptions.json.zip",
    "visual_genome/objects.json": f"{_GENOME}/objects.json.zip",
    "visual_genome/image_data.json": f"{_GENOME}/image_data.json.zip",
    "visual_genome/densecap_splits.json": "https://raw.githubusercontent.com/jcjohnson/densecap/"
    "master/info/densecap_splits.json",
    "visual_genome/VG_100K": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "visual_genome/VG_100K_2": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    _TOKENIZER: "https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/ (then `icl-moe tokenizer "
    "convert`)",
}
"""What paper scale reads, below --data -> where it is published."""


def reproduce(
    name: str,
    scale: Scale,
    out: Path,
    data: Path | None = None,
    rows: Sequence[str] = (),
    confirmed: bool = False,
    dry_run: bool = False,
) -> str:
    """Train and evaluate the rows of a table, or what a figure is of, and return the table as text.
    Finished rows are not done again, and the stages of an unfinished one resume.

    data: the folder of the data sets, at paper scale. rows: names, by default all. confirmed:
    whether paper scale may begin. dry_run: do nothing, and return the commands. Raises InputError
    if there is no such row, if data sets are missing, if paper scale is not confirmed, if `out`
    holds runs of other settings, and if a stage fails.
    """
    out = output_folder(out)
    line = _Line(scale, out, data or Path("data"))
    if name in FIGURES:
        figure = FIGURES[name](scale)
        if rows:
            raise InputError(f"--rows chooses rows of a table; {name} is a figure.")
        chosen, needed = figure.rows, _files_of(figure)
        commands = line.commands_of(figure)
    else:
        table = TABLES[name](scale)
        chosen, needed = table.chosen(tuple(rows)), DATA_SETS
        commands = (each for row in chosen for run in row.runs for each in line.commands(run))
    if dry_run:
        return "\n".join(dict.fromkeys(map(str, commands)))
    if scale == "paper":
        _print_cost(chosen)
        _check_data(line.data, needed)
        if not confirmed:
            raise InputError(
                "--scale paper costs what is listed above; add --yes to start it, or choose rows "
                "of a table with --rows."
            )
    with writing(out), locked(out, "--out"):
        if name in FIGURES:
            return _draw(figure, line, out / name)
        return _fill(table, chosen, line, out / name)


def _files_of(figure: PaperFigure) -> dict[str, str]:
    """What a figure reads at paper scale, below --data -> where it is published."""
    standard = figure.elsewhere.standard if figure.elsewhere else None
    return DATA_SETS | dict(standard.also if standard else ())


def _draw(figure: PaperFigure, line: "_Line", folder: Path) -> str:
    print(f"\n== {figure.name}: {', '.join(run.name for run in figure.runs)}", flush=True)
    if figure.task is None:
        return as_text(_draw_gradients(figure, line, folder))
    (run,) = figure.runs
    line.do(run)
    sets = [line.evaluated(run, figure.task)]
    if figure.elsewhere is not None:
        line.evaluate_elsewhere(run, figure.elsewhere)
        sets.insert(0, line.evaluated_elsewhere(run, figure.elsewhere, figure.task))
    text = as_text(write_pictures(folder, figure, sets))
    return f"{text}\n\nThe figure: {folder / 'figure.html'}"


def _draw_gradients(figure: PaperFigure, line: "_Line", folder: Path) -> Table:
    from icl_moe.reproduce.gradients import measure, write_gradients

    models = []
    for row in figure.rows:
        (run,) = row.runs
        line.train(run)
        name = published_tables()["table3"].rows[row.name].system
        models.append(measure(name, line.folder(run) / "run", line.recipe(run)))
    return write_gradients(folder, figure, models)


def _fill(table: PaperTable, chosen: Sequence[Row], line: "_Line", folder: Path) -> str:
    text = ""
    for row in chosen:
        for run in row.runs:
            print(f"\n== {table.name}, {row.name}: {run.name}", flush=True)
            line.do(run)
        text = as_text(write_table(folder, table, line.results(table)))
    return text


class _Line:
    """The stages of runs at one scale, with the results in `out`."""

    def __init__(self, scale: Scale, out: Path, data: Path) -> None:
        self.scale, self.out, self.data = scale, out, data
        self._environment = ON_CPU if scale == "demo" else {}

    def commands(self, run: Run) -> Iterator[Command]:
        """The stages, in order."""
        folder = self.folder(run)
        yield self._build(run.trained)
        yield self._build(run.evaluated)
        yield self._train(run)
        fitted = ("--threshold-from", str(self._trained(run))) if _draws_at_once(run) else ()
        yield self._verb("export", folder / "run", "--out", folder / "model", *fitted)
        shards = self.out / "shards" / run.evaluated.name
        yield self._evaluate(run, shards, folder / "evaluation", *run.evaluation)

    def commands_of(self, figure: PaperFigure) -> Iterator[Command]:
        """The stages of the runs of a figure, as far as it needs them."""
        for run in figure.runs:
            if figure.task is None:
                yield from (self._build(run.trained), self._train(run))
                continue
            yield from self.commands(run)
            if figure.elsewhere is not None:
                yield from self._elsewhere(run, figure.elsewhere)

    def do(self, run: Run) -> None:
        """Run the stages that are not finished."""
        self._claim(run)
        if self.metrics(run) is not None:
            print(f"{self.folder(run)} is finished.", flush=True)
            return
        for command in self.commands(run):
            command.run()

    def train(self, run: Run) -> None:
        """Run the stages up to the last checkpoint, as far as they are not finished."""
        self._claim(run)
        if self.metrics(run) is not None:
            print(f"{self.folder(run)} is finished.", flush=True)
            return
        for command in (self._build(run.trained), self._train(run)):
            command.run()

    def evaluate_elsewhere(self, run: Run, elsewhere: Elsewhere) -> None:
        """Evaluate a run that is done on other queries."""
        out = self._evaluation_elsewhere(run, elsewhere)
        if (out / "metrics.json").is_file():
            print(f"{out} is finished.", flush=True)
            return
        for command in self._elsewhere(run, elsewhere):
            command.run()

    def evaluated(self, run: Run, task: str) -> Evaluated:
        """The evaluation of a run that is done."""
        what = "of classes that training never showed" if self.scale == "demo" else "held out"
        shards, folder = self.out / "shards" / run.evaluated.name, self.folder(run) / "evaluation"
        return open_evaluation(what, run.name, shards, folder, task)

    def evaluated_elsewhere(self, run: Run, elsewhere: Elsewhere, task: str) -> Evaluated:
        """The evaluation of a run on other queries."""
        shards = self.out / "shards" / elsewhere.shards.name
        folder = self._evaluation_elsewhere(run, elsewhere)
        return open_evaluation(elsewhere.what, run.name, shards, folder, task)

    def _evaluation_elsewhere(self, run: Run, elsewhere: Elsewhere) -> Path:
        return self.folder(run) / f"evaluation_{elsewhere.shards.name}"

    def recipe(self, run: Run) -> TrainingRecipe:
        """The recipe that a run is trained by."""
        return load_recipe(TrainingRecipe, run.recipe, self._overrides(run))

    def _claim(self, run: Run) -> None:
        """Record the settings of a run in its folder. Raises InputError if it holds another."""
        folder = self.folder(run)
        record, settings = folder / "settings.json", _settings_of(run)
        if not record.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(settings, indent=1) + "\n")
        elif read_json(record) != settings:
            raise InputError(
                f"{folder} holds a run of other settings; choose another --out, or delete that "
                "folder."
            )

    def _trained(self, run: Run) -> Path:
        return self.out / "shards" / run.trained.name

    def _overrides(self, run: Run) -> tuple[str, ...]:
        folder = self.folder(run)
        return (
            f"data.shards={self._trained(run)}",
            f"training.output={folder / 'run'}",
            *run.settings,
        )

    def _train(self, run: Run) -> Command:
        ranks = RANKS_OF_THE_DEMO if self.scale == "demo" else None
        return launch(ranks, run.recipe, *self._overrides(run), environment=self._environment)

    def _evaluate(self, run: Run, shards: Path, out: Path, *options: str) -> Command:
        shots = ",".join(map(str, run.shots))
        model = self.folder(run) / "model"
        return self._verb("evaluate", model, shards, "--shots", shots, *options, "--out", out)

    def _elsewhere(self, run: Run, elsewhere: Elsewhere) -> Iterator[Command]:
        shards, standard = elsewhere.shards, elsewhere.standard
        if standard is not None:
            data, episodes = self.data / standard.folder, self.out / "episodes"
            yield self._verb("episodes", standard.name, "--data", data, "--out", episodes)
            sources = (
                f"tokenizer={self.data / _TOKENIZER}",
                f"episodes={episodes / standard.name}.jsonl",
                f"episodes_data={data}",
            )
            shards = replace(shards, settings=(*sources, *shards.settings))
        built = self.out / "shards" / shards.name
        yield self._verb("shards", "build", shards.recipe, *shards.settings, "--out", built)
        one = replace(run, shots=run.shots[:1])
        yield self._evaluate(
            one, built, self._evaluation_elsewhere(run, elsewhere), *run.evaluation
        )

    def metrics(self, run: Run) -> dict[str, Any] | None:
        """What the evaluation of a finished run wrote; None for any other, and for one of other
        settings.
        """
        folder = self.folder(run)
        path, record = folder / "evaluation/metrics.json", folder / "settings.json"
        if not (path.is_file() and record.is_file()) or read_json(record) != _settings_of(run):
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def results(self, table: PaperTable) -> dict[str, dict[str, Any]]:
        """Run's name -> its metrics, for every finished run of a table."""
        runs = {run.name: run for row in table.rows for run in row.runs}
        found = {name: self.metrics(run) for name, run in runs.items()}
        return {name: metrics for name, metrics in found.items() if metrics is not None}

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def _build(self, shards: Shards) -> Command:
        sources = self._sources(shards) if self.scale == "paper" else ()
        folder = self.out / "shards" / shards.name
        settings = (*sources, *shards.settings)
        return self._verb("shards", "build", shards.recipe, *settings, "--out", folder)

    def _sources(self, shards: Shards) -> Iterator[str]:
        """Overrides that name the data sets. The held-out captions are of the classes of the
        training's: fewer descriptions of a class are no reason to leave it out there.
        """
        coco, genome = self.data / "coco", self.data / "visual_genome"
        yield f"tokenizer={self.data / _TOKENIZER}"
        yield f"segmentation.images={coco / f'{shards.split}2017'}"
        yield f"segmentation.annotations={coco / f'annotations/instances_{shards.split}2017.json'}"
        yield f"captioning.images={genome}"
        for key in ("region_descriptions", "objects", "image_data"):
            name = "regions" if key == "region_descriptions" else key
            yield f"captioning.{name}={genome / key}.json"
        yield f"captioning.splits={genome / 'densecap_splits.json'}"
        yield f"captioning.split={shards.split}"
        yield "captioning.counted_split=train"

    def _verb(self, *arguments: str | Path) -> Command:
        return verb(*arguments, environment=self._environment)


def _settings_of(run: Run) -> dict[str, Any]:
    """All that a run's results depend on, besides the data, as JSON gives it back: the run and what
    its recipes say, which may be edited or come in another version.
    """
    used = [(run.recipe, "icl_moe")]
    used += [(shards.recipe, "preprocessing") for shards in (run.trained, run.evaluated)]
    recipes = {
        f"{package}: {name}": read_recipe(find_recipe(name, package)) for name, package in used
    }
    content = vars(run) | {"recipes": recipes}
    found: dict[str, Any] = json.loads(json.dumps(content, default=vars))
    return found


def _draws_at_once(run: Run) -> bool:
    """Whether the masks of a run's model are written in one pass, so that their threshold has to be
    fitted.
    """
    recipe = load_recipe(TrainingRecipe, run.recipe, run.settings)
    has_masks = "segmentation=null" not in run.evaluated.settings
    return recipe.training.mask_corruption and has_masks and "autoregressive" not in run.evaluation


def _print_cost(rows: Sequence[Row]) -> None:
    table, notes = describe_cost(rows)
    print(as_text(table), *notes, sep="\n", flush=True)


def _check_data(data: Path, needed: Mapping[str, str]) -> None:
    missing = [name for name in needed if not (data / name).exists()]
    if missing:
        lines = [f"missing: {data / name}    published at {needed[name]}" for name in missing]
        print(*lines, sep="\n", flush=True)
        raise InputError(
            f"--data: {len(missing)} of {len(needed)} files and folders of {data} are missing, "
            "the first of them "
            f"{data / missing[0]}; they are listed above with where they are published."
        )
