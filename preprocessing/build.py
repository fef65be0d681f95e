"""`icl-moe shards build`: from a data recipe to a shard folder, stage by stage.

Finished encoded chunks and packed shards are kept in the output folder, and the same command
resumes from them. The manifest is written last, so a folder with a manifest is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
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
    ShardInfo,
    ShardSet,
    index_file,
)
from icl_moe.devices import Device
from icl_moe.errors import InputError
from icl_moe.inputs import read_json
from icl_moe.locks import LOCK_FILE, locked
from icl_moe.messages import note
from icl_moe.outputs import output_folder
from icl_moe.processes import join_processes, share_of
from icl_moe.sequence import SequenceCodec, SequenceFormat
from icl_moe.settings import from_dict, to_dict
from icl_moe.tasks import TASKS
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.masks import PatchTokenizer
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing import synthetic, world
from preprocessing.episode_file import EpisodeFile, read_episodes
from preprocessing.pack import (
    Packer,
    ShardRange,
    TaskEpisodes,
    collect,
    pack_shard,
    shard_ranges,
)
from preprocessing.plan import Pictures, Plan, Planner
from preprocessing.pool import PoolRegion
from preprocessing.quantize import BATCH, CodeStore, join_chunks, quantize
from preprocessing.recipe import DataRecipe
from preprocessing.region_table import RegionTable
from preprocessing.sources import check_sections
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
        if process.is_main_process:
            note(
                f"{out} is complete, so nothing was built; if the sources have changed since, give "
                "--out another folder."
            )
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
    planner = Planner(recipe, codec, out, folder.work, workers, fixed, folder.check_plan)
    plan = planner.plan(process)
    pictures = Pictures(plan, codec.format)
    rank, ranks, workers = process.process_index, process.num_processes, share_of(workers)
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
    if process.is_main_process:
        join_chunks(folder.work, len(pictures))
    process.wait_for_everyone()

    tasks = _task_episodes(plan, fixed)
    packer = Packer(out, folder.work, codec, CodeStore(folder.work), tasks, recipe.image_size)
    ranges = [
        shard
        for task in tasks
        for shard in shard_ranges(task, len(tasks[task].episodes), recipe.shard_size)
    ]
    _pack(packer, ranges[rank::ranks], workers, shows_progress=rank == 0)
    process.wait_for_everyone()
    if process.is_main_process:
        shards, classes = collect(packer, ranges)
        tokenizers.to("cpu").save(out)
        codec.text.save(out / "text_tokenizer")
        _manifest(recipe, codec, tokenizers, plan, out, shards, classes, fixed).write(out)
        shutil.rmtree(folder.work)
    process.wait_for_everyone()
    return Manifest.read(out)


def _task_episodes(plan: Plan, fixed: EpisodeFile | None) -> dict[str, TaskEpisodes]:
    notes = [] if fixed is None else fixed.notes()
    return {
        task: TaskEpisodes(
            TASKS[task], pool.regions, plan.episodes[task], plan.pictures[task], notes
        )
        for task, pool in plan.pools.items()
    }


def _pack(packer: Packer, mine: list[ShardRange], workers: int, shows_progress: bool) -> None:
    """Write this process's shards."""
    with tqdm(
        total=sum(shard.stop - shard.start for shard in mine),
        desc="packing samples",
        unit="sample",
        disable=not shows_progress,
    ) as progress:
        for count in ordered_map(pack_shard, packer, mine, workers):
            progress.update(count)


def _manifest(
    recipe: DataRecipe,
    codec: SequenceCodec,
    tokenizers: ImageTokenizers,
    plan: Plan,
    out: Path,
    shards: tuple[ShardInfo, ...],
    classes: dict[str, dict[str, int]],
    fixed: EpisodeFile | None,
) -> Manifest:
    """The manifest of finished shards, whose companions are in `out`."""
    pools = plan.pools.values()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        format=codec.format,
        examples=recipe.examples,
        image_size=recipe.image_size,
        **tokenizers.fingerprints,
        text_tokenizer=codec.text.fingerprint,
        recipe=to_dict(recipe),
        samples={task: len(episodes) for task, episodes in plan.episodes.items()},
        classes=classes,
        shards=shards,
        files=tuple(FileInfo.of(out, name) for name in _companions(out, plan.pools)),
        skipped={
            f"{pool.task}.{reason}": count
            for pool in pools
            for reason, count in sorted(pool.skipped.items())
            if count
        },
        bad_images={pool.task: pool.bad_images for pool in pools if pool.bad_images},
        standard=None if fixed is None else fixed.header(),
    )


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
            # its image check are kept. The state goes last, since nothing else tells that the
            # folder is a build's.
            for made in ("synthetic", "composed"):
                self._discard(self.out / made)
            self._state_file.unlink()
        if self.out.exists() and (
            not self.out.is_dir()
            or any(path.name not in (".build", LOCK_FILE) for path in self.out.iterdir())
        ):
            raise InputError(
                f"{self.out} exists and holds no shards; choose another --out or an empty folder."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        self._write({"settings": self._settings})

    @staticmethod
    def _discard(made: Path) -> None:
        """Remove a folder that appears completely or not at all, in the same way."""
        partial = made.with_name(f"{made.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if made.is_dir():
            os.replace(made, partial)
            shutil.rmtree(partial, ignore_errors=True)

    def check_plan(self, plan: Plan) -> None:
        """Raise InputError if the plan is not the plan of the build's first results, which are
        identified by its numbers. Then the sources have changed, or another version of the package
        plans differently.
        """
        digest = hashlib.sha256(f"batches of {BATCH}, filled".encode())
        for pool in plan.pools.values():
            digest.update(_digest_of(pool.regions))
        for numbers in (*plan.episodes.values(), *plan.pictures.values(), plan.places):
            digest.update(np.ascontiguousarray(numbers).data)
        state = self._read_state()
        if state.get("plan", digest.hexdigest()) != digest.hexdigest() and self._has_results():
            raise InputError(
                f"The data's sources have changed since the build in {self.out} began, or another "
                "version of icl-moe began it; delete that folder to start over."
            )
        self._write({**state, "plan": digest.hexdigest()})

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


def _digest_of(regions: Sequence[PoolRegion]) -> bytes:
    if isinstance(regions, RegionTable):
        return regions.digest().encode()
    return b"".join(hashlib.sha256(repr(region).encode()).digest() for region in regions)


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
    tokenizers = ImageTokenizers(pictures, masks, features)
    if reason := tokenizers.features_unlike(vocabulary):
        raise InputError(f"{recipe.features_tokenizer}: {reason}; set it to that.")
    return tokenizers


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


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
