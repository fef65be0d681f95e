"""Figure 6: how large each task's gradient is in each part of the model, and whether the gradients
of the tasks agree, in dense models and in those with experts.

The norms over training are those that training itself has written (gradients.csv); cosines are
computed here, at the checkpoints that a run keeps.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from PIL import Image

from icl_moe.canvas import SAFE, Canvas, Panel, legend
from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.figures import PaperFigure
from icl_moe.reproduce.output import write_figure
from icl_moe.tables import Table
from icl_moe.training import checkpoint
from icl_moe.training.task_gradients import WHOLE, TaskGradients, task_gradients

_WIDTH, _TOP, _PANEL, _GAP = 1380, 96, 210, 96

_BETWEEN = ("between the tasks", 2, "#24292f")


@dataclass(frozen=True)
class Measured:
    """What was measured of one model. rows: the rows of its gradients.csv. at: the gradients in
    each of its checkpoints, the oldest first.
    """

    name: str
    rows: Sequence[Mapping[str, str]]
    at: Sequence[TaskGradients]

    @property
    def tasks(self) -> list[str]:
        return list(self.at[-1].norms)

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers, from 0."""
        parts = self.at[-1].norms[self.tasks[0]]
        return sorted(int(part.split(".")[1]) for part in parts if part.endswith(".attention"))

    def attention(self, task: str, layer: int) -> list[float]:
        """The normalised gradient of a layer's attention in each step that was reported."""
        part = f"layers.{layer}.attention"
        return [
            float(row["normalised"])
            for row in self.rows
            if row["task"] == task and row["part"] == part
        ]

    def over_training(self, task: str) -> list[tuple[int, float]]:
        """(step, the normalised gradient of all attention layers together)."""
        squares: dict[int, float] = {}
        for row in self.rows:
            if row["task"] == task and row["part"].endswith(".attention"):
                step = int(row["step"])
                squares[step] = squares.get(step, 0.0) + float(row["normalised"]) ** 2
        return [(step, square**0.5) for step, square in sorted(squares.items())]


def measure(name: str, run: Path, recipe: TrainingRecipe, batches: int = 16) -> Measured:
    """Measure a run in its folder, over so many batches of each task at each checkpoint. Raises
    InputError if it has no report of gradients, or no checkpoint.
    """
    report = run / "gradients.csv"
    if not report.is_file():
        raise InputError(f"{report} is missing; delete {run.parent} to train that model again.")
    with report.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    at = [task_gradients(recipe, folder, batches) for folder in checkpoint.whole_checkpoints(run)]
    if not at:
        raise InputError(f"{run} holds no whole checkpoint; delete {run.parent} to train again.")
    return Measured(name, rows, at)


def write_gradients(folder: Path, figure: PaperFigure, models: Sequence[Measured]) -> Table:
    """Write the figure's files into `folder`, and return its table."""
    table = cosines_table(models)
    write_figure(
        folder,
        figure,
        _says(figure, models),
        _content(figure, models),
        picture=draw_gradients(figure.title, models),
        tables=[("Cosines of gradients, all parameters", table)],
    )
    write_whole(folder / "figure.csv", _numbers(models))
    return table


def cosines_table(models: Sequence[Measured]) -> Table:
    """A line for each checkpoint of each model: cosines of the whole gradient."""
    tasks = models[0].tasks
    head = ["model", "step", "between the tasks", *(f"within {task}" for task in tasks)]
    lines = []
    for model in models:
        for at in model.at:
            between = [cosines[WHOLE] for cosines in at.between.values()]
            within = [at.within[task][WHOLE] for task in tasks]
            cells = [f"{value:.3f}" for value in (*between, *within)]
            lines.append([model.name, str(at.step), *cells])
    return Table(head, lines)


def draw_gradients(title: str, models: Sequence[Measured]) -> Image.Image:
    """A row of three panels for each model."""
    canvas = Canvas(title, _WIDTH, _TOP + len(models) * (_PANEL + _GAP))
    marks = {task: (task, number, SAFE[number]) for number, task in enumerate(models[0].tasks)}
    legend(canvas, (40, 56), [*marks.values(), _BETWEEN])
    most = max(max(m.attention(t, n)) for m in models for t in m.tasks for n in m.layers)
    together = max(y for m in models for t in m.tasks for _, y in m.over_training(t))
    lowest = min(_lowest(model.at[-1]) for model in models)
    for number, model in enumerate(models):
        top = _TOP + number * (_PANEL + _GAP) + 34
        canvas.text((40, top - 38), model.name, "lm", size=15)
        _by_layer(canvas, top, model, marks, 1.08 * most)
        _over_training(canvas, top, model, marks, 1.08 * together)
        _by_part(canvas, top, model, marks, lowest)
    return canvas.finish_for_print()


_Marks = Mapping[str, tuple[str, int, str]]


def _by_layer(canvas: Canvas, top: float, model: Measured, marks: _Marks, most: float) -> None:
    layers = model.layers
    panel = Panel(
        canvas,
        (80, top, 420, top + _PANEL),
        "normalised gradient of attention, mean ± SD of steps",
        (-0.5, len(layers) - 0.5),
        (0.0, most),
    )
    for place, layer in enumerate(layers):
        panel.x_label(place, str(layer + 1))
    panel.x_title("attention layer")
    for task in model.tasks:
        _, kind, colour = marks[task]
        values = [model.attention(task, layer) for layer in layers]
        beside = 0.06 * (kind - 0.5)
        panel.line([(n + beside, mean(v)) for n, v in enumerate(values)], colour)
        for n, v in enumerate(values):
            panel.whisker(n + beside, mean(v) - pstdev(v), mean(v) + pstdev(v), colour)
            panel.mark((n + beside, mean(v)), kind, colour)


def _over_training(canvas: Canvas, top: float, model: Measured, marks: _Marks, most: float) -> None:
    last = max(int(row["step"]) for row in model.rows)
    panel = Panel(
        canvas,
        (500, top, 840, top + _PANEL),
        "normalised gradient of all attention layers",
        (0, last),
        (0.0, most),
    )
    for value in (0, last // 2, last):
        panel.x_label(value, f"{value:,}")
    panel.x_title("training step")
    for task in model.tasks:
        _, kind, colour = marks[task]
        points = model.over_training(task)
        panel.line(points, colour)
        for point in points[:: max(1, len(points) // 8)]:
            panel.mark(point, kind, colour, 3)


def _by_part(canvas: Canvas, top: float, model: Measured, marks: _Marks, lowest: float) -> None:
    at = model.at[-1]
    parts = _shown_parts(at)
    panel = Panel(
        canvas,
        (920, top, 1340, top + _PANEL),
        f"cosine of two gradients, after {at.step:,} steps",
        (-0.6, len(parts) - 0.4),
        (min(-0.1, lowest - 0.08), 1.05),
    )
    size = 12 if len(parts) <= 12 else 8
    for place, (label, part) in enumerate(parts):
        panel.x_label(place, label, size)
        for task in model.tasks:
            _, kind, colour = marks[task]
            if part in at.within[task]:
                panel.mark((place, at.within[task][part]), kind, colour)
        for cosines in at.between.values():
            if part in cosines:
                panel.mark((place, cosines[part]), _BETWEEN[1], _BETWEEN[2], 5)
    panel.x_title("all; embeddings; attention (A) and feed-forward with its experts (F) by layer")


def _shown_parts(at: TaskGradients) -> list[tuple[str, str]]:
    """(label, part) of the whole, the embeddings, and each layer's attention and feed-forward."""
    parts = next(iter(at.norms.values()))
    short = {"attention": "A", "feed_forward": "F"}
    layers = [
        (f"{short[what]}{int(number) + 1}", part)
        for part in parts
        if part.startswith("layers.")
        for _, number, what in [part.split(".")]
        if what in short
    ]
    layers.sort(key=lambda entry: (int(entry[1].split(".")[1]), entry[0]))
    return [("all", WHOLE), ("emb.", "token_embedding"), *layers]


def _lowest(at: TaskGradients) -> float:
    shown = {part for _, part in _shown_parts(at)}
    of_all = [*at.between.values(), *at.within.values()]
    return min(value for cosines in of_all for part, value in cosines.items() if part in shown)


def _says(figure: PaperFigure, models: Sequence[Measured]) -> str:
    at = models[0].at[-1]
    runs = " and ".join(
        f"{run.name} ({len({row['step'] for row in model.rows})} of its training steps)"
        for run, model in zip(figure.runs, models, strict=True)
    )
    return (
        f"What each task asks of each part of the model: gradients of the runs {runs}, and cosines "
        f"over {at.episodes} episodes of each task at {len(models[0].at)} checkpoint(s) of each."
    )


def _content(figure: PaperFigure, models: Sequence[Measured]) -> dict[str, Any]:
    return {
        "runs": [json.loads(json.dumps(run, default=vars)) for run in figure.runs],
        "models": [
            {
                "name": model.name,
                "attention": {
                    task: {str(n): mean(model.attention(task, n)) for n in model.layers}
                    for task in model.tasks
                },
                "checkpoints": [
                    {
                        "step": at.step,
                        "episodes": at.episodes,
                        "norms": at.norms,
                        "cosines_within": at.within,
                        "cosines_between": {" and ".join(k): v for k, v in at.between.items()},
                    }
                    for at in model.at
                ],
            }
            for model in models
        ],
    }


def _numbers(models: Sequence[Measured]) -> str:
    """Every number of the figure, one a line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "step", "what", "task", "part", "value"])
    for model in models:
        for row in model.rows:
            for what in ("norm", "normalised"):
                writer.writerow(
                    [model.name, row["step"], what, row["task"], row["part"], row[what]]
                )
        for at in model.at:
            for task, of_task in at.within.items():
                for part, value in of_task.items():
                    writer.writerow([model.name, at.step, "cosine", task, part, f"{value:.6g}"])
            for tasks, of_tasks in at.between.items():
                for part, value in of_tasks.items():
                    both = " and ".join(tasks)
                    writer.writerow([model.name, at.step, "cosine", both, part, f"{value:.6g}"])
    return file.getvalue()
