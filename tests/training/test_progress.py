"""The figures of progress lines, computed by hand, for two ranks and a clock that the test
controls.
"""

import contextlib
import io
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from icl_moe.model.loss import DecoderLoss
from icl_moe.training import monitor
from icl_moe.training.expert_table import Choice
from icl_moe.training.monitor import ProgressMonitor

START, END, EVERY, GLOBAL_BATCH, PEAK = 3, 7, 3, 8, 50.0
TASKS = {4: "segmentation", 5: "captioning", 6: "segmentation", 7: "captioning"}
NORMS = {4: 0.5, 5: 2.0, 6: 3.5, 7: 4.0}
SECONDS = {6: 10_983.0, 7: 20.0}  # since the line before
EXPERTS = [[(0, 1), (2, 3), (3, 0)], [(1, 0), (2, 3), (3, 1)]]
"""The experts of three streams at each of two lines: the sets of the first two streams are the same
at both lines.
"""


def micro_step(step: int, rank: int, number: int) -> dict[str, float]:
    """The contribution of one micro-step. Captions also have image targets, as if inputs had a
    loss.
    """
    texts = 5.0 + rank if TASKS[step] == "captioning" else 0.0
    return {
        "image_sum": 10.0 * step + rank + 3 * number,
        "image_weight": 4.0 + rank + texts / 2,
        "text_sum": texts * (step - number),
        "text_weight": texts,
        "auxiliary": 1.0 + step / 8 + number / 4,
        "tokens": 100 * step + 10 * rank + number,
        "flops": 7 * step + rank,
    }


def watched(place: Any) -> tuple[list[tuple[str, float, int]], str]:
    """The events and the output of this rank."""
    events: list[tuple[str, float, int]] = []
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    tasks = list(dict.fromkeys(TASKS.values()))
    with (
        mock.patch.object(monitor, "time", clock),
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        monitors = SimpleNamespace(write_events=events.extend)
        chosen = iter(EXPERTS)
        progress = ProgressMonitor(
            START,
            END,
            EVERY,
            GLOBAL_BATCH,
            tasks,
            place,
            PEAK,
            monitors,
            lambda: [Choice(0, stream, two, (0.5, 0.5)) for stream, two in enumerate(next(chosen))],
        )
        for step, task in TASKS.items():
            for number in range(2):
                values = micro_step(step, place.rank, number)
                tokens, flops = (int(values.pop(name)) for name in ("tokens", "flops"))
                parts = {name: torch.tensor(value) for name, value in values.items()}
                progress.add(task, DecoderLoss(torch.zeros(()), **parts), tokens, flops)
            now += SECONDS.get(step, 0.0)
            progress.step_done(step, task, NORMS[step], rate=step / 100)
        progress.close()
    return events, printed.getvalue()


def expected(steps: tuple[int, ...]) -> dict[str, float]:
    """The figures of the line after the last of `steps`, which are the steps since the previous
    line.
    """

    def total(name: str, covered: list[int]) -> float:
        return sum(
            micro_step(s, rank, number)[name]
            for s in covered
            for rank in (0, 1)
            for number in (0, 1)
        )

    def losses(covered: list[int]) -> dict[str, float]:
        found = {"auxiliary_loss": total("auxiliary", covered) / (4 * len(covered))}
        for modality in ("image", "text"):
            if weight := total(f"{modality}_weight", covered):
                found[f"{modality}_loss"] = total(f"{modality}_sum", covered) / weight
        return found

    last, seconds, of_all = steps[-1], SECONDS[steps[-1]], list(steps)
    figures = losses(of_all) | {
        "gradient_norm": NORMS[last],
        "learning_rate": last / 100,
        "tokens_per_second": total("tokens", of_all) / seconds,
        "episodes_per_second": len(steps) * GLOBAL_BATCH / seconds,
        "model_flops_utilisation": total("flops", of_all) / seconds / PEAK,
    }
    if last == END:
        figures["expert_changes"] = 1
    for task in {TASKS[step] for step in steps}:
        mine = [step for step in steps if TASKS[step] == task]
        of_task = losses(mine) | {"gradient_norm": sum(NORMS[s] for s in mine) / len(mine)}
        figures |= {f"{task}/{name}": value for name, value in of_task.items()}
    return {f"train/{name}": value for name, value in figures.items()}


def test_a_line_has_the_means_since_the_line_before_over_all_ranks(rank_group):
    (events, printed), others = rank_group(2).run(watched)
    assert others == ([], "")
    for steps in ((4, 5, 6), (7,)):
        found = {name: value for name, value, at in events if at == steps[-1] * GLOBAL_BATCH}
        assert found == pytest.approx(expected(steps)), steps
    assert len(events) == len(expected((4, 5, 6))) + len(expected((7,)))
    first, last = printed.splitlines()
    assert first.startswith("step 6/7  segmentation  ")
    assert first.endswith("  ETA 1:01:01")  # One step of 10,983 s / 3.
    assert last.endswith("  ETA 0:00:00")
