"""The rate at which one reader process feeds training: python benchmarks/loader.py [--json FILE]

Shards of paper_256's format (three examples and a query at 256 px, 515 tokens per pair) are packed
into a temporary folder. One worker of our loader, which reads samples in the schedule's shuffled
order, and one of a plain webdataset pipeline, which reads the same shards sequentially, produce
batches of the same composition in turns. Compare the ratio; tokens exclude padding.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from measure import Goal, report
from random_shards import write_shards
from torch.utils.data import DataLoader, IterableDataset

from icl_moe.batch import TokenBatch, collate
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.recipe import TrainingRecipe
from icl_moe.sequence import SequenceFormat, Span, TokenSequence
from icl_moe.settings import load_recipe

SAMPLES, SHARD_SIZE = 2000, 500
BATCHES, ROUNDS = 200, 7
AHEAD = 8
"""Micro-batches that are dropped before a turn is timed: the worker made them during the other's
turn.
"""

GOALS = {"tokens/s": 1_000_000.0, "ratio to webdataset": 1.0}


class PlainPipeline(IterableDataset[TokenBatch]):
    """webdataset's reader and decoders on the shards of each task in order, then our collate."""

    def __init__(self, folder: Path, shards: ShardSet, schedule: Schedule, part: RankSlice) -> None:
        self._vocabulary = shards.manifest.format.vocabulary
        self._schedule = schedule
        self._part = part
        self._tars = {
            task: [
                str(folder / shard.file) for shard in shards.manifest.shards if shard.task == task
            ]
            for task in shards.manifest.samples
        }

    def __iter__(self) -> Iterator[TokenBatch]:
        streams = {
            task: iter(webdataset.WebDataset(tars, shardshuffle=False).repeat().decode())
            for task, tars in self._tars.items()
        }
        step = 0
        while True:
            task = self._schedule.task(step)
            for _ in range(self._part.micro_steps):
                sequences = [
                    _sequence(sample) for sample in islice(streams[task], self._part.micro_batch)
                ]
                yield collate(sequences, self._vocabulary, task)
            step += 1


def _sequence(sample: dict[str, Any]) -> TokenSequence:
    tokens_L = sample["tokens.npy"].astype(np.int64)
    return TokenSequence(
        tokens_L, np.arange(len(tokens_L)), tuple(Span(*span) for span in sample["json"]["spans"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="episodes of each task (default %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=BATCHES, help="micro-batches in a turn (default %(default)s)"
    )
    options = parser.parse_args()
    figures = {"cores": len(os.sched_getaffinity(0)), **measure(options.samples, options.batches)}
    report(
        figures, [Goal(name, figures[name], bound) for name, bound in GOALS.items()], options.json
    )


def measure(samples: int, batches: int) -> dict[str, float]:
    """The medians over the rounds of both rates and of their ratio."""
    recipe = load_recipe(TrainingRecipe, "paper_256")
    batch, micro_batch = min(recipe.training.global_batch, samples), recipe.training.micro_batch
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "shards"
        print(f"packing {2 * samples} samples ...", file=sys.stderr, flush=True)
        write_shards(folder, SequenceFormat(recipe.vocabulary), samples, SHARD_SIZE)
        shards, part = (
            ShardSet(folder),
            RankSlice.of(0, 1, batch - batch % micro_batch, micro_batch),
        )
        schedule = Schedule(shards.manifest.samples, batch - batch % micro_batch, seed=0)
        ours = micro_batches(
            MicroBatches(shards, schedule, part, "packed", 0.0),
            part.micro_steps,
            0,
            recipe.training.steps,
            workers=1,
        )
        pipeline = PlainPipeline(folder, shards, schedule, part)
        theirs = iter(DataLoader(pipeline, batch_size=None, num_workers=1, prefetch_factor=4))
        # The first round is a warm-up.
        rates = [(_rate(ours, batches), _rate(theirs, batches)) for _ in range(ROUNDS + 1)][1:]
        del ours, theirs  # Their workers must end before the folder is deleted.
    return {
        "tokens/s": statistics.median(mine for mine, _ in rates),
        "webdataset tokens/s": statistics.median(other for _, other in rates),
        "ratio to webdataset": statistics.median(mine / other for mine, other in rates),
    }


def _rate(source: Iterator[TokenBatch], batches: int) -> float:
    """Tokens per second over the next `batches`."""
    for _ in islice(source, AHEAD):
        pass
    started = time.perf_counter()
    tokens = sum(len(batch.tokens_T) for batch in islice(source, batches))
    return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
