"""What scoring costs: python benchmarks/evaluation.py [--json FILE]

    scoring / decoding   1,000 queries of each task, one example each: their scores with intervals,
                         against decoding them with a model of the demo's size with random weights,
                         whose outputs are longer than a trained one's. Decoding is timed on some of
                         them, in batches of 8
    CIDEr                40,000 captions with 5 references each, against pycocoevalcap's scorer,
                         whose scores must be equal

Everything runs in one process. The Java programs of METEOR and of the PTB tokenizer, which start a
process and read a dictionary, are no part of the ratio; where there is a Java, scoring with them is
timed too.
"""

import argparse
import os
import random
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from line import build_shards, random_model
from measure import Goal, report
from pycocoevalcap.cider.cider import Cider

from icl_moe.data.shards import ShardSet
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.inference.model import InContextModel
from icl_moe.sequence import Episode
from icl_moe.tasks import CAPTIONING, Task
from icl_moe.tasks.caption_scores import score_captions
from icl_moe.tasks.cider import cider_d
from icl_moe.tasks.java import find_java
from icl_moe.tasks.task import Output

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--quick", action="store_true", help="a few queries, to test the benchmark itself"
    )
    options = parser.parse_args()
    queries, decoded, captions = (40, 8, 50) if options.quick else (1000, 64, 40_000)
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "Java": find_java()[1] or "there is one",
    }
    goals = []
    with tempfile.TemporaryDirectory() as folder:
        build_shards(Path(folder))
        shards, model = random_model(Path(folder))
        for task in shards.manifest.samples:
            share = score_and_decode(model, shards, task, queries, decoded, figures)
            goals.append(Goal(f"scoring / decoding, {task}", share, 0.02, at_most=True))
    ours, theirs = cider(captions)
    figures[f"CIDEr of {captions:,} captions: s"] = ours
    figures["pycocoevalcap / ours, CIDEr: time"] = theirs / ours
    goals.append(Goal(f"CIDEr of {captions:,} captions: s", ours, 60, at_most=True))
    report(figures, goals, options.json)


def score_and_decode(
    model: InContextModel,
    shards: ShardSet,
    task_name: str,
    queries: int,
    decoded: int,
    figures: dict[str, Any],
) -> float:
    """The time of scoring `queries` queries over the time of decoding them."""
    episodes = EpisodeSet(shards, model.codec, task_name, decoded)
    truths = [episodes[number] for number in range(len(episodes))]
    _decode(model, truths[:BATCH])
    started = time.perf_counter()
    outputs = [
        output
        for first in range(0, len(truths), BATCH)
        for output in _decode(model, truths[first : first + BATCH])
    ]
    decoding = (time.perf_counter() - started) / len(truths) * queries
    repeated = list(islice(cycle(truths), queries))
    predictions = list(islice(cycle(outputs), queries))
    started = time.perf_counter()
    _score(episodes.task, predictions, repeated, model)
    scoring = time.perf_counter() - started
    figures[f"{task_name}: decoding {queries:,} queries, s"] = decoding
    figures[f"{task_name}: scoring {queries:,} queries, s"] = scoring
    if episodes.task is CAPTIONING and find_java()[0]:
        started = time.perf_counter()
        episodes.task.score([predictions], repeated, model.format)
        figures[f"{task_name}: the same with Java, s"] = time.perf_counter() - started
    return scoring / decoding


def _score(
    task: Task, predictions: list[Output], repeated: list[EvaluationEpisode], model: InContextModel
) -> None:
    """The scores with intervals, but without the Java programs."""
    if task is not CAPTIONING:
        task.score([predictions], repeated, model.format)
        return
    references = {str(n): truth.meta["references"][0] for n, truth in enumerate(repeated)}
    texts = {str(n): output["caption"] or "" for n, output in enumerate(predictions)}
    score_captions([texts], references, java=False, with_intervals=True)


def _decode(model: InContextModel, batch: list[EvaluationEpisode]) -> list[Output]:
    task = batch[0].task
    requests = [
        (Episode(task, truth.category, truth.pairs[:1]), truth.query.image) for truth in batch
    ]
    return task.said(model, model.complete(requests))


def cider(captions: int) -> tuple[float, float]:
    """The seconds that ours and pycocoevalcap's CIDEr take, whose scores must be equal. Words have
    the frequencies of Zipf's law, and captions 8 to 12 of them, as COCO's.
    """
    drawn = random.Random(0)
    words = [f"w{number}" for number in range(8000)]
    weights = [1 / (number + 1) for number in range(8000)]

    def caption() -> str:
        return " ".join(drawn.choices(words, weights, k=drawn.randint(8, 12)))

    candidates = [caption() for _ in range(captions)]
    right = [[caption() for _ in range(5)] for _ in range(captions)]
    started = time.perf_counter()
    ours_Q = cider_d(candidates, right)
    ours = time.perf_counter() - started
    truths, answers = dict(enumerate(right)), {n: [text] for n, text in enumerate(candidates)}
    started = time.perf_counter()
    _, theirs_Q = Cider().compute_score(truths, answers)
    theirs = time.perf_counter() - started
    np.testing.assert_allclose(ours_Q, theirs_Q, atol=1e-9)
    return ours, theirs


if __name__ == "__main__":
    main()
