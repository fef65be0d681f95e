"""`icl-moe shards build`: from a data recipe to a shard folder, stage by stage.

Finished encoded chunks and packed shards are kept in the output folder, and the same command
resumes from them. The manifest is written last, so a folder with a manifest is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from icl_moe.data.location import MANIFEST_FILE, FileInfo
from icl_moe.data.shards import (
    SCHEMA_VERSION,
    TOKENIZER_FOLDERS,
    Manifest,
    ShardSet,
    index_file,
)
from icl_moe.devices import Device
from icl_moe.errors import InputError
from icl_moe.inputs import read_json
from icl_moe.locks import LOCK_FILE, locked
from icl_moe.outputs import output_folder
from icl_moe.processes import join_processes
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TooLongError
from icl_moe.settings import from_dict, to_dict
from icl_moe.tasks import SEMANTIC_SEGMENTATION, TASKS
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.masks import PatchTokenizer
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing import synthetic, world
from preprocessing.episode_file import EpisodeFile, read_episodes
from preprocessing.episodes import plan_episodes
from preprocessing.image_check import ImageCheck
from preprocessing.pack import Packer, TaskEpisodes, collect, pack_shard, shard_ranges
from preprocessing.pool import Pool
from preprocessing.quantize import BATCH, CodeStore, Picture, pictures_of, quantize
from preprocessing.recipe import DataRecipe
from preprocessing.several_classes import paint_episodes
from preprocessing.sources import Reading, check_sections, read_pools
from preprocessing.standard_pools import read_fixed_pool
from preprocessing.workers import ordered_map


def build_shards(
    recipe: DataRecipe,
    out: Path,
    workers: int,
    device: Device | None = None,
    codes_cache: Path | None = None,
) -> Manifest:
    """Build the shard folder `out` on `workers` processes, and on all devices under `accelerate
    launch`.

    Resumes an earlier build with the same settings. device: see `join_processes`. codes_cache: a
    folder in which builds share the codes of equal pictures; the bytes of shards are the same with
    and without it. Raises InputError for bad input, and if a folder holds something else or cannot
    be written.
    """
    check_sections(recipe)
    fixed = None
    if recipe.episodes is not None:
        fixed = read_episodes(Path(recipe.episodes))
        recipe = recipe.of_episodes(fixed.shots)
    out = output_folder(out)
    process = join_processes(device)
    tokenizers = _open_tokenizers(recipe)
    codec = SequenceCodec(
        _format(recipe, tokenizers),
        TextTokenizer(recipe.vocabulary.text_merges, recipe.text_tokenizer),
    )
    fingerprints = {**tokenizers.fingerprints, "text_tokenizer": codec.text.fingerprint}
    folder = _WorkFolder(out, recipe, fingerprints)
    if folder.is_complete() and not folder.work.exists():
        return ShardSet(out).manifest
    with locked(out, "--out") if process.is_main_process else contextlib.nullcontext():
        return _build(process, folder, recipe, tokenizers, codec, workers, fixed, codes_cache)


def _build(
    process: PartialState,
    folder: "_WorkFolder",
    recipe: DataRecipe,
    tokenizers: ImageTokenizers,
    codec: SequenceCodec,
    workers: int,
    fixed: EpisodeFile | None,
    codes_cache: Path | None,
) -> Manifest:
    """`build_shards` in a folder that this build has locked."""
    out = folder.out
    with process.main_process_first():
        is_complete = folder.is_complete()
    if is_complete:
        # An earlier build was stopped between its last two steps, or another build has just ended.
        shutil.rmtree(folder.work, ignore_errors=True)
        return ShardSet(out).manifest
    with process.main_process_first():
        if process.is_main_process:
            folder.open()
            _draw_scenes(recipe, out, workers)
    pools, episodes, notes = _plan(process, folder, recipe, codec, workers, fixed)
    pictures, tasks = _number_pictures(pools, episodes, codec, notes)
    rank, ranks = process.process_index, process.num_processes
    quantize(
        pictures,
        tokenizers,
        recipe.image_size,
        folder.work,
        workers,
        process.device,
        rank,
        ranks,
        codes_cache,
    )
    process.wait_for_everyone()

    packer = Packer(
        out, folder.work, codec, CodeStore(folder.work, len(pictures)), tasks, recipe.image_size
    )
    ranges = [
        shard
        for task in tasks
        for shard in shard_ranges(task, len(tasks[task].episodes), recipe.shard_size)
    ]
    mine = ranges[rank::ranks]
    with tqdm(
        total=sum(shard.stop - shard.start for shard in mine),
        desc="packing samples",
        unit="sample",
        disable=rank != 0,
    ) as progress:
        for count in ordered_map(pack_shard, packer, mine, workers):
            progress.update(count)
    process.wait_for_everyone()
    if process.is_main_process:
        shards, classes = collect(packer, ranges)
        tokenizers.to("cpu").save(out)
        codec.text.save(out / "text_tokenizer")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            format=codec.format,
            examples=recipe.examples,
            image_size=recipe.image_size,
            **tokenizers.fingerprints,
            text_tokenizer=codec.text.fingerprint,
            recipe=to_dict(recipe),
            samples={task: len(episodes[task]) for task in tasks},
            classes=classes,
            shards=shards,
            files=tuple(FileInfo.of(out, name) for name in _companions(out, tasks)),
            skipped={
                f"{pool.task}.{reason}": count
                for pool in pools
                for reason, count in sorted(pool.skipped.items())
                if count
            },
            bad_images={pool.task: pool.bad_images for pool in pools if pool.bad_images},
            standard=None if fixed is None else fixed.header(),
        )
        manifest.write(out)
        shutil.rmtree(folder.work)
    process.wait_for_everyone()
    return Manifest.read(out)


_Plan = tuple[list[Pool], dict[str, np.ndarray], Sequence[dict[str, Any]]]
"""The pools, the numbers of each task's regions in its episodes, and what KEY.json says besides."""


def _plan(
    process: PartialState,
    folder: "_WorkFolder",
    recipe: DataRecipe,
    codec: SequenceCodec,
    workers: int,
    fixed: EpisodeFile | None,
) -> _Plan:
    """Draw the episodes that a recipe describes, or take those of a file."""
    choices = (recipe.missing_images, recipe.bad_images) if fixed is None else ("skip", "skip")
    check = ImageCheck(*choices, folder.work, workers, process)
    if fixed is not None:
        data = Path(str(recipe.episodes_data))
        pool, of_file, notes = read_fixed_pool(fixed, data, recipe.image_size, check, workers)
        _drop_texts_without_room(pool, codec)
        if count := pool.skipped["texts_without_room"]:
            raise InputError(
                f"{recipe.episodes}: {count} of its descriptions are longer than a sequence has "
                "room for; set image_size higher."
            )
        pools, episodes = [pool], {pool.task: of_file}
    else:
        reading = Reading(recipe.image_size, check, workers, folder.out, process)
        pools = _read_pools(recipe.with_scenes_in(folder.out / "synthetic"), codec, reading)
        notes = []
    with process.main_process_first():
        folder.check_pools(pools)
    if fixed is None:
        episodes = {
            pool.task: plan_episodes(
                pool, recipe.examples, recipe.samples, recipe.seed, recipe.balance
            )
            for pool in pools
        }
        for place, pool in enumerate(pools):
            if pool.task == SEMANTIC_SEGMENTATION.name:
                found = paint_episodes(pool, episodes[pool.task], recipe.seed)
                pools[place], episodes[pool.task] = found
    return pools, episodes, notes


class _WorkFolder:
    """The output folder of a build: checks that the build may write it, and keeps the state to
    resume from.
    """

    def __init__(self, out: Path, recipe: DataRecipe, fingerprints: dict[str, str | None]) -> None:
        self.out = out
        self.work = out / ".build"
        self._fingerprints = fingerprints
        self._state_file = self.work / "state.json"
        # The round trip through JSON makes this equal to what is read back later.
        self._settings = json.loads(
            json.dumps(_settings(to_dict(recipe), fingerprints, SCHEMA_VERSION))
        )

    def is_complete(self) -> bool:
        """Whether `out` already holds these very shards. Raises InputError if it holds others."""
        if not (self.out / MANIFEST_FILE).is_file():
            return False
        manifest = Manifest.read(self.out)
        found = _settings(
            _with_newer_keys(manifest.recipe),
            {name: getattr(manifest, name) for name in self._fingerprints},
            manifest.schema_version,
        )
        self._check_settings(found, "shards")
        return True

    def open(self) -> None:
        """Begin a build, or resume one with the same settings. Raises InputError if `out` holds
        anything else.
        """
        if self._state_file.is_file():
            found = self._read_state()["settings"]
            if found == self._settings:
                return
            if self._has_results():
                self._check_settings(found, "unfinished shards")
            # The other recipe produced nothing, for example because it was refused. The results of
            # its image check are kept.
            self._state_file.unlink()
            for made in ("synthetic", "composed"):
                shutil.rmtree(self.out / made, ignore_errors=True)
        if self.out.exists() and (
            not self.out.is_dir()
            or any(path.name not in (".build", LOCK_FILE) for path in self.out.iterdir())
        ):
            raise InputError(
                f"{self.out} exists and holds no shards; choose another --out or an empty folder."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        self._write({"settings": self._settings})

    def check_pools(self, pools: list[Pool]) -> None:
        """Raise InputError if the sources have changed since the first results of the build."""
        digest = hashlib.sha256(f"batches of {BATCH}, filled".encode())
        for pool in pools:
            for region in pool.regions:
                digest.update(repr(region).encode())
        state = self._read_state()
        if state.get("pools", digest.hexdigest()) != digest.hexdigest() and self._has_results():
            raise InputError(
                f"The data's sources have changed since the build in {self.out} began; delete that "
                "folder to start over."
            )
        self._write({**state, "pools": digest.hexdigest()})

    def _has_results(self) -> bool:
        """Whether there are results that a build can resume from."""
        return any(self.work.glob("codes-*.npy")) or any(self.out.glob("*.tar"))

    def _read_state(self) -> dict[str, Any]:
        state = read_json(self._state_file)
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise InputError(f"{self._state_file} is damaged; delete {self.out} to start over.")
        return state

    def _check_settings(self, found: dict[str, Any], what: str) -> None:
        then, now = _flatten(found), _flatten(self._settings)
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                raise InputError(
                    f"{self.out} holds {what} of another recipe ({key} is {then.get(key)!r} there, "
                    f"{now.get(key)!r} here); "
                    "choose another --out, or delete it."
                )

    def _write(self, state: dict[str, Any]) -> None:
        partial = self._state_file.with_suffix(f".partial{os.getpid()}")
        partial.write_text(json.dumps(state), encoding="utf-8")
        os.replace(partial, self._state_file)


def _settings(
    recipe: dict[str, Any], fingerprints: dict[str, str | None], schema_version: int
) -> dict[str, Any]:
    """Everything except the sources that determines the bytes of a shard folder."""
    named = {name.replace("_", " "): value for name, value in fingerprints.items()}
    return {**recipe, **named, "schema version": schema_version}


def _with_newer_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """A manifest's recipe, with defaults for keys that were added after it was written."""
    try:
        return to_dict(from_dict(DataRecipe, recipe, MANIFEST_FILE))
    except InputError:
        return recipe


def _open_tokenizers(recipe: DataRecipe) -> ImageTokenizers:
    """The tokenizers that a recipe names. Raises InputError if one is missing or damaged, or if its
    number of codes differs from the recipe's vocabulary.
    """
    precision, vocabulary = recipe.tokenizer_precision, recipe.vocabulary
    pictures = VQGAN.from_pretrained(recipe.tokenizer, precision) if recipe.tokenizer else None
    masks = PatchTokenizer.from_pretrained(recipe.mask_tokenizer) if recipe.mask_tokenizer else None
    features = (
        FeaturesTokenizer.from_pretrained(recipe.features_tokenizer)
        if recipe.features_tokenizer
        else None
    )
    if pictures is not None and vocabulary.image_codes != pictures.codebook_size:
        raise InputError(
            f"vocabulary.image_codes is {vocabulary.image_codes}, but the tokenizer "
            f"{recipe.tokenizer} has {pictures.codebook_size} codes; set it to that."
        )
    if masks is not None and masks.codes > vocabulary.image_codes:
        raise InputError(
            f"mask_tokenizer: {recipe.mask_tokenizer} has {masks.codes} codes, more than "
            f"vocabulary.image_codes ({vocabulary.image_codes})."
        )
    paints = recipe.segmentation is not None and recipe.segmentation.classes_per_mask > 1
    if masks is not None and paints and masks.painted_codes > vocabulary.image_codes:
        raise InputError(
            f"mask_tokenizer: {recipe.mask_tokenizer} has {masks.painted_codes} codes for painted "
            f"masks, more than vocabulary.image_codes ({vocabulary.image_codes}); set it higher, "
            "or, beside a VQ-GAN, set mask_tokenizer=null."
        )
    if features is not None and vocabulary.features != features.codebook_size:
        raise InputError(
            f"vocabulary.features is {vocabulary.features}, but the features tokenizer "
            f"{recipe.features_tokenizer} has {features.codebook_size} codes; set it to that."
        )
    return ImageTokenizers(pictures, masks, features)


def _format(recipe: DataRecipe, tokenizers: ImageTokenizers) -> SequenceFormat:
    """The sequence format of a recipe. Raises InputError if the image size is not a multiple of a
    tokenizer's cell.
    """
    width = tokenizers.downsampling
    if recipe.image_size % width:
        raise InputError(
            f"image_size is {recipe.image_size}; the tokenizer "
            f"{recipe.tokenizer or recipe.features_tokenizer} needs a multiple of {width}."
        )
    return recipe.sequence_format((recipe.image_size // width) ** 2)


def _companions(out: Path, tasks: Iterable[str]) -> list[str]:
    """The files that belong to the shards: indices and tokenizers."""
    tokenizers = sorted(
        path
        for folder in TOKENIZER_FOLDERS
        if (out / folder).is_dir()
        for path in (out / folder).iterdir()
    )
    return [*map(index_file, tasks), *(path.relative_to(out).as_posix() for path in tokenizers)]


def _draw_scenes(recipe: DataRecipe, out: Path, workers: int) -> None:
    """Draw the synthetic data set into the shard folder, completely or not at all."""
    folder, scenes = out / "synthetic", recipe.synthetic
    if recipe.draws_scenes and not folder.is_dir():
        partial = out / "synthetic.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if scenes.world == "classes":
            world.write_dataset(partial, scenes, recipe.image_size, workers)
        else:
            synthetic.write_dataset(partial, scenes.images, scenes.seed, scenes.split)
        os.replace(partial, folder)


def _read_pools(recipe: DataRecipe, codec: SequenceCodec, reading: Reading) -> list[Pool]:
    """The pool of each task, without regions that no episode can use. Raises InputError if a task
    has none left.
    """
    pools = list(read_pools(recipe, reading))
    for pool in pools:
        _drop_texts_without_room(pool, codec)
        pool.drop_small_classes(images=recipe.examples + 1)
        if not pool.regions:
            raise _nothing_left(pool, recipe.examples)
    return pools


_REMEDIES = {
    "boxes_of_negative_size": "correct the boxes",
    "captions_without_a_seen_class": "name classes that both the captions and the images have",
    "classes_with_too_few_descriptions": "set captioning.min_descriptions lower",
    "classes_with_too_few_images": "provide more data or set examples lower",
    "combinations_of_small_scale": "set segmentation.least_scale lower",
    "crowds_alone": "set segmentation.crowds=instances to take crowds (iscrowd=1) as instances",
    "empty_boxes": "correct the boxes",
    "empty_masks": "correct the outlines",
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


def _drop_texts_without_room(pool: Pool, codec: SequenceCodec) -> None:
    task, image = TASKS[pool.task], np.zeros(codec.format.codes_per_image, dtype=np.int64)
    fits = []
    for region in tqdm(pool.regions, desc=f"measuring {pool.task}", unit="region"):
        try:
            drawn = [image] * len(task.pictures(region.target, codec.format))
            pair = task.pair(codec.format, region.category, image, region.target, drawn)
            codec.encode(Episode(task, region.category, (pair,)))
            fits.append(region)
        except TooLongError:
            pool.skipped["texts_without_room"] += 1
    pool.regions = fits


def _number_pictures(
    pools: list[Pool],
    episodes: dict[str, np.ndarray],
    codec: SequenceCodec,
    notes: Sequence[dict[str, Any]],
) -> tuple[list[Picture], dict[str, TaskEpisodes]]:
    """All distinct pictures that the episodes need, in the order of the pools, those of images
    first, so that nearly all batches are of one tokenizer; and the numbers of each region's
    pictures.
    """

    def used(pool: Pool) -> Iterator[tuple[int, tuple[Picture, ...]]]:
        task = TASKS[pool.task]
        for number in np.unique(episodes[pool.task]).tolist():
            yield number, pictures_of(pool.regions[number], task, codec.format)

    numbers: dict[Picture, int] = {}
    for pool in pools:
        for _, (image, *_) in used(pool):
            numbers.setdefault(image, len(numbers))
    tasks = {}
    for pool in pools:
        places = {
            number: [numbers.setdefault(picture, len(numbers)) for picture in pictures]
            for number, pictures in used(pool)
        }
        width = max(map(len, places.values()), default=1)
        of_region = np.full((len(pool.regions), width), -1, dtype=np.int64)
        for number, of_pictures in places.items():
            of_region[number, : len(of_pictures)] = of_pictures
        task = TASKS[pool.task]
        tasks[pool.task] = TaskEpisodes(task, pool.regions, episodes[pool.task], of_region, notes)
    return list(numbers), tasks


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
