"""`icl-moe demo`: the whole pipeline at small scale, with the commands that a user would type.

This module is at the top of the package, because it uses all the others.
"""

import csv
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from icl_moe.evaluation.protocol import evaluate
from icl_moe.evaluation.report import Section, summary
from icl_moe.evaluation.results import Metrics
from icl_moe.model.decoder import InContextDecoder
from icl_moe.outputs import output_folder
from icl_moe.pages.chart import Chart, line_chart
from icl_moe.stages import launch, verb
from icl_moe.training.expert_table import choices_table, expert_choices

RANKS = 2

_RECIPE = "modern_demo"
"""The data recipe, and the training recipe."""

_VALIDATION = ("synthetic.split=val", "synthetic.seed=1", "synthetic.images=160", "samples=200")


def run_demo(out: Path) -> None:
    """Draw data, build shards, train on two ranks, export, evaluate with one example, and print the
    path of the report.

    The finished stages of an interrupted demo are kept. Raises InputError if `out` cannot be
    written or a stage fails.
    """
    out = output_folder(out)
    train, validation, run, model, report = (
        out / "shards/train",
        out / "shards/validation",
        out / "run",
        out / "model",
        out / "evaluation",
    )
    started = time.monotonic()
    _say("1/5 Draw scenes in COCO's formats, and build shards")
    verb("shards", "build", _RECIPE, "--out", train).run()
    verb("shards", "build", _RECIPE, *_VALIDATION, "--out", validation).run()
    _say(f"2/5 Train on {RANKS} ranks")
    launch(RANKS, _RECIPE, f"data.shards={train}", f"training.output={run}").run()
    _say("3/5 Export the model, and fit how its masks are read on training episodes")
    verb("export", run, "--out", model, "--threshold-from", train).run()
    _say("4/5 Segment and caption scenes of held-out classes with one example; swap the examples")
    metrics = _evaluate(model, validation, run, report)
    _say("5/5 Done")
    print(summary(metrics))
    print(
        f"\nThe report with pictures: {report / 'report.html'}    "
        f"({time.monotonic() - started:.0f} s in all)"
    )


def _evaluate(model: Path, shards: Path, run: Path, report: Path) -> Metrics:
    """Evaluate as `icl-moe evaluate` does, with two more sections in the report: the loss curve,
    and the experts of each stream.
    """
    print(
        "$ "
        + shlex.join(
            ["icl-moe", "evaluate", str(model), str(shards), "--shots", "1", "--out", str(report)]
        ),
        flush=True,
    )
    experts = choices_table(expert_choices(InContextDecoder.from_pretrained(model)))
    sections = [
        Section("Training", charts=(_loss_curve(run),)),
        Section("Experts", tables=(experts,)),
    ]
    metrics = evaluate(model, shards, report, shots=(1,), sections=sections)
    assert metrics is not None, "this is the only process"
    return metrics


def _loss_curve(run: Path) -> Chart:
    """A chart of what DeepSpeed's CSV monitor wrote. A resumed run takes the steps after its
    checkpoint again, so the last value of a step counts.
    """
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for name in ("image_loss", "text_loss"):
        with (run / "csv_monitor" / f"train_{name}.csv").open(encoding="utf-8", newline="") as file:
            values = dict(_numbers(file))
        series[name.replace("_", " ")] = (sorted(values), [values[x] for x in sorted(values)])
    return line_chart(series, "episodes seen", "nats per target")


def _numbers(file: Iterable[str]) -> Iterator[tuple[float, float]]:
    """The pairs of numbers in CSV, without the headers, which a resumed run writes again, and
    without a line that was cut off.
    """
    for row in csv.reader(file):
        try:
            samples, value = map(float, row)
        except ValueError:
            continue
        yield samples, value


def _say(stage: str) -> None:
    print(f"\n== {stage}", flush=True)
