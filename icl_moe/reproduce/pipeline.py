"""Builds, trains, exports and evaluates the rows of a table, and fills it.

OUT/shards/NAME      the shards, which rows and tables with the same data share
OUT/runs/NAME        a run: run/ (checkpoints), model/ (the export), evaluation/
OUT/TABLE            table.json, table.md and table.html, written anew after every row
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.inputs import read_json
from icl_moe.locks import locked
from icl_moe.outputs import output_folder, writing
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.cost import describe_cost
from icl_moe.reproduce.output import write_table
from icl_moe.reproduce.tables import TABLES, PaperTable, Row, Run, Scale, Shards
from icl_moe.settings import load_recipe
from icl_moe.stages import ON_CPU, Command, launch, verb
from icl_moe.tables import as_text

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
    """Train and evaluate the rows of a table, and return the table as text. Finished rows are not
    done again, and the stages of an unfinished one resume.

    data: the folder of the data sets, at paper scale. rows: names, by default all. confirmed:
    whether paper scale may begin. dry_run: do nothing, and return the commands. Raises InputError
    if there is no such row, if data sets are missing, if paper scale is not confirmed, if `out`
    holds runs of other settings, and if a stage fails.
    """
    table = TABLES[name](scale)
    chosen = table.chosen(tuple(rows))
    out = output_folder(out)
    line = _Line(scale, out, data or Path("data"))
    if dry_run:
        runs = dict.fromkeys(run for row in chosen for run in row.runs)
        return "\n".join(dict.fromkeys(str(each) for run in runs for each in line.commands(run)))
    if scale == "paper":
        _print_cost(chosen)
        _check_data(line.data)
        if not confirmed:
            raise InputError(
                "--scale paper costs what is listed above; add --yes to start it, or choose rows "
                "with --rows."
            )
    with writing(out), locked(out, "--out"):
        return _fill(table, chosen, line, out / name)


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
        folder = self._folder(run)
        yield self._build(run.trained)
        yield self._build(run.evaluated)
        trained = self.out / "shards" / run.trained.name
        yield launch(
            RANKS_OF_THE_DEMO if self.scale == "demo" else None,
            run.recipe,
            f"data.shards={trained}",
            f"training.output={folder / 'run'}",
            *run.settings,
            environment=self._environment,
        )
        fitted = ("--threshold-from", str(trained)) if _draws_at_once(run) else ()
        yield self._verb("export", folder / "run", "--out", folder / "model", *fitted)
        yield self._verb(
            "evaluate",
            folder / "model",
            self.out / "shards" / run.evaluated.name,
            "--shots",
            ",".join(map(str, run.shots)),
            *run.evaluation,
            "--out",
            folder / "evaluation",
        )

    def do(self, run: Run) -> None:
        """Run the stages that are not finished."""
        folder = self._folder(run)
        record, settings = folder / "settings.json", _settings_of(run)
        if record.is_file():
            if read_json(record) != settings:
                raise InputError(
                    f"{folder} holds a run of other settings; choose another --out, or delete that "
                    "folder."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(settings, indent=1) + "\n")
        if self.metrics(run) is not None:
            print(f"{folder} is finished.", flush=True)
            return
        for command in self.commands(run):
            command.run()

    def metrics(self, run: Run) -> dict[str, Any] | None:
        """What the evaluation of a finished run wrote; None for any other, and for one of other
        settings.
        """
        folder = self._folder(run)
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

    def _folder(self, run: Run) -> Path:
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
    """All that a run's results depend on, as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(run, default=vars))
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


def _check_data(data: Path) -> None:
    missing = [name for name in DATA_SETS if not (data / name).exists()]
    if missing:
        lines = [f"missing: {data / name}    published at {DATA_SETS[name]}" for name in missing]
        print(*lines, sep="\n", flush=True)
        raise InputError(
            f"--data: {len(missing)} of {len(DATA_SETS)} files and folders of {data} are missing, "
            "the first of them "
            f"{data / missing[0]}; they are listed above with where they are published."
        )
