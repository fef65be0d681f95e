"""The plan of a build: the regions of each task, the episodes that they form, and the pictures to
encode for these.

The first process makes the plan and writes it into the build's folder. All processes map its files,
so that several on a machine share one copy, and a build that is resumed takes it from there if its
sources are as they were. The files are arrays of NumPy without pickled objects, and JSON.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from icl_moe import __version__
from icl_moe.errors import InputError
from icl_moe.inputs import read_json
from icl_moe.processes import on_first, share_of
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TooLongError
from icl_moe.settings import to_dict
from icl_moe.tasks import SEMANTIC_SEGMENTATION, TASKS
from icl_moe.tasks.task import Picture, Task
from preprocessing.episode_file import EpisodeFile
from preprocessing.episodes import plan_episodes
from preprocessing.image_check import ImageCheck, image_states
from preprocessing.pool import Pool, PoolRegion
from preprocessing.quantize import pictures_of
from preprocessing.recipe import DataRecipe
from preprocessing.region_table import RegionTable, mapped
from preprocessing.several_classes import paint_episodes
from preprocessing.sources import Reading, named_files, read_pools
from preprocessing.standard_pools import read_fixed_pool
from preprocessing.workers import ordered_map

_CHUNK = 4096
"""Regions that a process looks at at once."""

_DIGEST = 16
"""Bytes of a picture's hash, by which equal pictures are found."""


@dataclass(frozen=True)
class Plan:
    """pools, by task. episodes: the numbers of each episode's regions, int64 (samples,
    examples + 1). pictures: for each region the numbers of its image and of the pictures that the
    task draws, int64 (regions, most pictures of a region), padded with -1. places: where each
    picture comes from, int64 (pictures, 3): the pool, the region, and which of its pictures it is.
    """

    pools: dict[str, Pool]
    episodes: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    places: np.ndarray

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the plan completely or not at all. Raises TypeError if a table cannot hold one of
        its pools.
        """
        tables = {task: RegionTable.of(pool.regions) for task, pool in self.pools.items()}
        partial = folder.with_name(f"{folder.name}.partial")
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        for task, table in tables.items():
            table.save(partial / task)
            np.save(partial / f"{task}.episodes.npy", self.episodes[task], allow_pickle=False)
            np.save(partial / f"{task}.pictures.npy", self.pictures[task], allow_pickle=False)
        np.save(partial / "places.npy", self.places, allow_pickle=False)
        pools = [
            {
                "task": pool.task,
                "skipped": pool.skipped,
                "bad_images": pool.bad_images,
                "same_instance": pool.same_instance,
            }
            for pool in self.pools.values()
        ]
        (partial / "plan.json").write_text(json.dumps({**about, "pools": pools}), "utf-8")
        os.replace(partial, folder)

    @classmethod
    def open(cls, folder: Path) -> "Plan":
        """A plan that `save` wrote; its arrays stay on the disk."""
        pools = [
            Pool(
                values["task"],
                RegionTable.open(folder / values["task"]),
                Counter(values["skipped"]),
                values["bad_images"],
                values["same_instance"],
            )
            for values in read_json(folder / "plan.json")["pools"]
        ]
        return cls(
            {pool.task: pool for pool in pools},
            {pool.task: mapped(folder / f"{pool.task}.episodes.npy") for pool in pools},
            {pool.task: mapped(folder / f"{pool.task}.pictures.npy") for pool in pools},
            mapped(folder / "places.npy"),
        )


class Pictures(Sequence[Picture]):
    """The distinct pictures of a plan, each made when it is asked for."""

    def __init__(self, plan: Plan, format: SequenceFormat) -> None:
        self._places, self._format = plan.places, format
        self._pools = list(plan.pools.values())

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, number: int) -> Picture: ...

    @overload
    def __getitem__(self, number: slice) -> list[Picture]: ...

    def __getitem__(self, number: int | slice) -> Picture | list[Picture]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        pool, region, which = self._places[number].tolist()
        task = TASKS[self._pools[pool].task]
        return pictures_of(self._pools[pool].regions[region], task, self._format)[which]


@dataclass(frozen=True)
class Planner:
    """Makes the plan of a recipe.

    out: the shard folder. work: the build's folder in it. fixed: the episodes of a file, if the
    recipe names one. check_plan: raises InputError if the results of this build so far are of
    another plan.
    """

    recipe: DataRecipe
    codec: SequenceCodec
    out: Path
    work: Path
    workers: int
    fixed: EpisodeFile | None
    check_plan: Callable[[Plan], None]

    def plan(self, process: PartialState) -> Plan:
        """The plan, which the first process makes unless an earlier build has left it."""
        made: list[Plan] = []

        def first() -> str:
            if self._is_stored():
                return "stored"
            check = self._image_check
            made.append(self._make(check))
            about = {"sources": self._sources, "images": image_states(check.seen)}
            try:
                made[0].save(self._folder, about)
            except TypeError:  # A task of another package, whose targets only it can read.
                return "apart"
            return "stored"

        if on_first(process, first) == "stored":
            return Plan.open(self._folder)
        # The regions of a task that is not stored exist only in the process that has read them.
        other = replace(self, workers=share_of(self.workers))
        return made[0] if made else other._make(other._image_check)

    @property
    def _folder(self) -> Path:
        return self.work / "plan"

    @property
    def _image_check(self) -> ImageCheck:
        fixed = self.fixed is not None
        missing, bad = self.recipe.missing_images, self.recipe.bad_images
        return ImageCheck(
            "skip" if fixed else missing, "skip" if fixed else bad, self.work, self.workers
        )

    @cached_property
    def _scenes(self) -> DataRecipe:
        return self.recipe.with_scenes_in(self.out / "synthetic")

    @cached_property
    def _sources(self) -> str | None:
        """A hash of the recipe and of the state of the files that it reads besides images; None if
        they are not known.
        """
        files = None if self.fixed is not None else named_files(self._scenes)
        if files is None:
            return None
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        how = [__version__, to_dict(self.recipe), repr(self.codec.format)]
        content = json.dumps([*how, self.codec.text.fingerprint, states])
        return hashlib.sha256(content.encode()).hexdigest()

    def _is_stored(self) -> bool:
        """Whether an earlier build has left the plan of these very sources."""
        file = self._folder / "plan.json"
        if not file.is_file() or self._sources is None:
            return False
        about = read_json(file)
        images = about["images"]
        if about["sources"] != self._sources or None in images.values():
            return False
        return image_states(Path(path) for path in images) == images

    def _make(self, check: ImageCheck) -> Plan:
        recipe = self.recipe
        if self.fixed is not None:
            pools, episodes = self._read_fixed(self.fixed, check)
        else:
            reading = Reading(recipe.image_size, check, self.workers, self.out)
            pools = list(read_pools(self._scenes, reading))
            for pool in pools:
                self._drop_texts_without_room(pool)
                pool.drop_small_classes(images=recipe.examples + 1)
                if not pool.regions:
                    raise _nothing_left(pool, recipe.examples)
            episodes = {
                pool.task: plan_episodes(
                    pool,
                    recipe.examples,
                    recipe.samples,
                    recipe.seed,
                    recipe.balance,
                    self.workers,
                )
                for pool in pools
            }
            for place, pool in enumerate(pools):
                if pool.task == SEMANTIC_SEGMENTATION.name:
                    found = paint_episodes(pool, episodes[pool.task], recipe.seed)
                    pools[place], episodes[pool.task] = found
        plan = self._number_pictures(pools, episodes)
        self.check_plan(plan)
        return plan

    def _read_fixed(
        self, fixed: EpisodeFile, check: ImageCheck
    ) -> tuple[list[Pool], dict[str, np.ndarray]]:
        data = Path(str(self.recipe.episodes_data))
        pool, episodes = read_fixed_pool(fixed, data, self.recipe.image_size, check, self.workers)
        self._drop_texts_without_room(pool)
        if count := pool.skipped["texts_without_room"]:
            raise InputError(
                f"{self.recipe.episodes}: {count} of its descriptions are longer than a sequence "
                "has room for; set image_size higher."
            )
        return [pool], {pool.task: episodes}

    def _drop_texts_without_room(self, pool: Pool) -> None:
        chunks = _chunks(np.arange(len(pool.regions)))
        work, fits = (pool.regions, TASKS[pool.task], self.codec), [np.zeros(0, dtype=bool)]
        with tqdm(
            total=len(pool.regions), desc=f"measuring {pool.task}", unit="region"
        ) as progress:
            for found in ordered_map(_fit, work, chunks, self.workers):
                fits.append(found)
                progress.update(len(found))
        fit = np.concatenate(fits)
        pool.skipped["texts_without_room"] += int((~fit).sum())
        pool.keep(fit)

    def _number_pictures(self, pools: list[Pool], episodes: dict[str, np.ndarray]) -> Plan:
        """The plan with all distinct pictures that the episodes need, in the order of the pools.
        The pictures of images come first, so that nearly all batches are of one tokenizer.
        """
        numbers: dict[Any, int] = {}
        images: dict[int, None] = {}
        places: list[tuple[int, int, int]] = []
        pictures = {}
        for place, pool in enumerate(pools):
            used = np.unique(episodes[pool.task])
            work = (pool.regions, TASKS[pool.task], self.codec.format)
            rows: list[list[int]] = []
            for chunk, keys in zip(
                _chunks(used),
                ordered_map(_picture_keys, work, _chunks(used), self.workers),
                strict=True,
            ):
                for region, of_region in zip(chunk.tolist(), keys, strict=True):
                    row = []
                    for which, key in enumerate(of_region):
                        number = numbers.setdefault(key, len(numbers))
                        if number == len(places):
                            places.append((place, region, which))
                        row.append(number)
                    images.setdefault(row[0])
                    rows.append(row)
            width = max(map(len, rows), default=1)
            column = np.full((len(pool.regions), width), -1, dtype=np.int64)
            for region, row in zip(used.tolist(), rows, strict=True):
                column[region, : len(row)] = row
            pictures[pool.task] = column
        others = (number for number in range(len(places)) if number not in images)
        order = np.array([*images, *others], dtype=np.int64)
        ranks = np.append(np.argsort(order), -1)  # The last one stays as the padding.
        return Plan(
            {pool.task: pool for pool in pools},
            episodes,
            {task: ranks[column] for task, column in pictures.items()},
            np.array(places, dtype=np.int64).reshape(-1, 3)[order],
        )


def _chunks(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]


def _fit(work: tuple[Sequence[PoolRegion], Task, SequenceCodec], numbers: np.ndarray) -> np.ndarray:
    """Whether a sequence has room for the texts of each region."""
    regions, task, codec = work
    image = np.zeros(codec.format.codes_per_image, dtype=np.int64)
    fits, prompts = [], set[str]()
    for region in (regions[number] for number in numbers.tolist()):
        if region.category in prompts and task.surely_fits(codec, region.category, region.target):
            fits.append(True)
            continue
        drawn = [image] * len(task.pictures(region.target, codec.format))
        pair = task.pair(codec.format, region.category, image, region.target, drawn)
        try:
            codec.encode(Episode(task, region.category, (pair,)))
            prompts.add(region.category)  # The prompt with this name has room.
            fits.append(True)
        except TooLongError:
            fits.append(False)
    return np.array(fits, dtype=bool)


def _picture_keys(
    work: tuple[Sequence[PoolRegion], Task, SequenceFormat], numbers: np.ndarray
) -> list[list[Any]]:
    """For each region a key of each of its pictures, which is equal for equal pictures: a hash for
    those that a table holds, of which there are many, otherwise the picture itself.
    """
    regions, task, format = work
    found: list[list[Any]] = []
    for number in numbers.tolist():
        pictures = pictures_of(regions[number], task, format)
        if isinstance(regions, RegionTable):
            found.append(
                [
                    hashlib.blake2b(repr(picture).encode(), digest_size=_DIGEST).digest()
                    for picture in pictures
                ]
            )
        else:
            found.append([*pictures])
    return found


_REMEDIES = {
    "boxes_of_negative_size": "correct the boxes",
    "captions_without_a_text": "write the captions",
    "captions_without_a_seen_class": "name classes that both the captions and the images have",
    "classes_with_too_few_descriptions": "set captioning.min_descriptions lower",
    "classes_with_too_few_images": "provide more data or set examples lower",
    "combinations_of_small_scale": "set segmentation.least_scale lower",
    "crowds_alone": "set segmentation.crowds=instances to take crowds (iscrowd=1) as instances",
    "empty_boxes": "correct the boxes",
    "empty_masks": "give the objects outlines, polygons or masks and not boxes alone",
    "images_without_a_mask": "give the images masks of their names",
    "lines_without_a_caption": "give the lines captions",
    "lines_without_a_mask": "give the lines masks",
    "masks_of_small_scale": "set segmentation.least_scale lower",
    "masks_lacking_an_instance": "give all instances an outline",
    "masks_that_mark_nothing": "mark objects in white",
    "missing_images": "add the missing images",
    "regions_without_a_class": "name classes that both the regions and the objects have",
    "small_objects": "set segmentation.small_objects=true",
    "texts_without_room": "shorten the texts or set image_size higher",
}
"""Reason for leaving something out -> what the user can do about it."""


def _nothing_left(pool: Pool, examples: int) -> InputError:
    reasons = {reason: count for reason, count in sorted(pool.skipped.items()) if count}
    left_out = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    remedies = [_REMEDIES[reason] for reason in reasons if reason in _REMEDIES]
    if pool.bad_images:
        remedies.append("replace the unusable images")
    if not remedies:
        remedies.append("provide more data")
    return InputError(
        f"No class of {pool.task} appears in the {examples + 1} images that an episode "
        f"needs{f' (left out: {left_out})' if left_out else ''}; "
        f"{', or '.join(dict.fromkeys(remedies))}."
    )
