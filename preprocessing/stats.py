"""`icl-moe shards stats`: what a shard folder holds, in tables; plots.py draws the same figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.errors import InputError
from icl_moe.tasks.task import lacks_class
from icl_moe.vocabulary import Vocabulary

LOOKED_AT = 2000
"""Samples of a task that are read for the figures that the index does not hold, evenly spaced."""

AREAS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0)
"""Bounds of the areas of objects, as shares of what a pair shows."""


@dataclass
class TaskFigures:
    """The figures of a task. lengths: tokens without padding, of every sample. The rest is of
    `read` samples: areas of the objects of all pairs as shares of the crop, how many queries lack
    the class, how often each code occurs, by the kind of code, and the names of the images.
    """

    lengths: np.ndarray
    classes: dict[str, int]
    read: int = 0
    areas: list[float] = field(default_factory=list)
    absent: int = 0
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    groups: Counter[str] = field(default_factory=Counter)


class ShardFigures:
    """The figures of a shard folder at a path or a URL, each task's read when it is needed."""

    def __init__(self, location: str | Path) -> None:
        self.shards = ShardSet(location)
        self.manifest = self.shards.manifest

    @property
    def name(self) -> str:
        return str(self.shards.location)

    @cached_property
    def tasks(self) -> dict[str, TaskFigures]:
        return {task: self._read(task) for task in self.manifest.samples}

    def _read(self, task: str) -> TaskFigures:
        count, vocabulary = self.manifest.samples[task], self.manifest.format.vocabulary
        figures = TaskFigures(self.shards.lengths(task), self.manifest.classes[task])
        kinds = {"image codes": vocabulary.image_range, **_features_rows(vocabulary)}
        seen = np.zeros(vocabulary.size, dtype=np.int64)
        numbers = evenly_spaced(count, LOOKED_AT)
        for number in tqdm(numbers, desc=f"reading {task}", unit="sample"):
            sample = self.shards.sample(task, number)
            seen += np.bincount(vocabulary.rows(sample.sequence.tokens_L), minlength=len(seen))
            shown = sample.meta["scale"]
            is_absent = lacks_class(sample.meta)
            figures.absent += is_absent
            figures.areas += shown[:-1] if is_absent else shown
            figures.images |= {source["image"] for source in sample.meta["sources"]}
            if group := sample.meta.get("group"):
                figures.groups[group] += 1
        figures.read = len(numbers)
        figures.codes = {
            kind: seen[ids.start : ids.stop] for kind, ids in kinds.items() if len(ids)
        }
        return figures


def shard_stats(location: str | Path, against: Sequence[str | Path] = ()) -> str:
    """Tables about the shard folder at a path or a URL: tasks, lengths, classes, areas of objects,
    use of codes, what was left out, and what it has in common with the folders `against`.
    """
    figures = ShardFigures(location)
    others = [ShardFigures(other) for other in against]
    lines = [*_overview(figures)]
    for task, of_task in figures.tasks.items():
        lines += _classes(task, of_task)
        lines += ["", f"areas of the objects of {task}, as shares of what a pair shows:"]
        counts, shares = area_counts(of_task.areas)
        lines += [
            f"  {bounds:<24}{count:>10}" for bounds, count in zip(shares, counts, strict=True)
        ]
        if of_task.absent:
            lines += ["", f"{of_task.absent} of {of_task.read} queries of {task} lack the class"]
        for kind, used in of_task.codes.items():
            lines += ["", f"{kind} of {task}, in {of_task.read} samples: {code_use(used)}"]
    for other in others:
        lines += _overlap(figures, other)
    manifest = figures.manifest
    if manifest.skipped:
        lines += ["", "left out (or clipped):"]
        lines += [f"  {reason:<50}{number:>10}" for reason, number in manifest.skipped.items()]
    for task, images in manifest.bad_images.items():
        lines += ["", f"images of {task} that cannot be used:"]
        lines += [f"  {name}: {why}" for name, why in images.items()]
    return "\n".join(lines)


def _features_rows(vocabulary: Vocabulary) -> dict[str, range]:
    """The rows of an embedding that belong to the features codes of each stage, by their name."""
    if vocabulary.feature_stages == 1:
        return {"features codes": vocabulary.feature_range}
    starts = range(vocabulary.feature_range.start, vocabulary.size, vocabulary.features)
    return {
        f"features codes, stage {stage}": range(start, start + vocabulary.features)
        for stage, start in enumerate(starts, 1)
    }


def area_counts(areas: Sequence[float]) -> tuple[list[int], list[str]]:
    """How many areas lie between each two of `AREAS`, and these bounds as text."""
    counts, _ = np.histogram(areas, bins=AREAS)
    bounds = [f"{low:.0%} to {high:.0%}" for low, high in pairwise(AREAS)]
    return counts.tolist(), bounds


def code_use(counts: np.ndarray) -> str:
    """How many of the codes occur, and the perplexity exp(-sum p log p) of their shares p: the
    number of codes that would be as varied if all were equally frequent.
    """
    if not counts.sum():
        return f"none of {len(counts)} occurs"
    shares = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(shares * np.log(shares)).sum())
    return (
        f"{np.count_nonzero(counts)} of {len(counts)} occur, perplexity {perplexity:.1f}, the "
        f"most frequent makes {shares.max():.1%}"
    )


def overlap(here: TaskFigures, there: TaskFigures) -> dict[str, tuple[int, int, int]]:
    """What two splits of a task have in common: name -> the numbers only here, in both, only
    there.
    """
    return {
        "classes": _shared(set(here.classes), set(there.classes)),
        "images": _shared(here.images, there.images),
    }


def _shared(here: set[str], there: set[str]) -> tuple[int, int, int]:
    return len(here - there), len(here & there), len(there - here)


def _overview(figures: ShardFigures) -> list[str]:
    shards, manifest = figures.shards, figures.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{shards.location}: {len(manifest.shards)} shards, {size:.1f} MB, {manifest.image_size} "
        f"px, {manifest.examples} examples, "
        f"a vocabulary of {manifest.format.vocabulary.size}, "
        f"{manifest.format.length(manifest.examples + 1)} positions",
        "",
        f"{'task':<14}{'samples':>10}{'classes':>9}{'shards':>8}   length without padding: min / "
        f"mean / max{'':4}targets",
    ]
    for task, count in manifest.samples.items():
        lengths = figures.tasks[task].lengths
        of_task = sum(shard.task == task for shard in manifest.shards)
        spread = f"{lengths.min()} / {lengths.mean():.1f} / {lengths.max()}"
        targets = int(shards.target_counts(task, range(count))[:, 1].sum())
        lines.append(
            f"{task:<14}{count:>10}{len(manifest.classes[task]):>9}{of_task:>8}   "
            f"{spread:<45}{targets}"
        )
    return lines


def _classes(task: str, figures: TaskFigures) -> list[str]:
    ranked = sorted(figures.classes.items(), key=lambda item: (-item[1], item[0]))
    lines = ["", f"classes of {task}:", *(f"  {name:<24}{number:>10}" for name, number in ranked)]
    if figures.groups:
        lines += ["", f"groups of classes of {task}, in {figures.read} samples:"]
        lines += [f"  {name:<24}{count:>10}" for name, count in figures.groups.most_common()]
    return lines


def _overlap(figures: ShardFigures, other: ShardFigures) -> list[str]:
    common = [task for task in figures.tasks if task in other.tasks]
    if not common:
        raise InputError(f"{other.name} has no task of {figures.name}.")
    lines = ["", f"compared with {other.name}:"]
    lines.append(f"  {'':<24}{'only here':>12}{'in both':>12}{'only there':>12}")
    for task in common:
        here, there = figures.tasks[task], other.tasks[task]
        for what, counts in overlap(here, there).items():
            lines.append(f"  {f'{what} of {task}':<24}" + "".join(f"{n:>12}" for n in counts))
    looked = max(figures.tasks[task].read for task in common)
    lines.append(f"  (images are those of at most {looked} samples)")
    return lines
