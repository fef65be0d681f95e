"""Holds samples of a shard folder against the annotations that they were made from, if those are
still where the recipe says.

A random share of the samples is made anew from the sources, as far as that is possible without the
build's own results: their regions are looked up by image, class and annotations, their pictures
drawn and encoded, and the sequence is written. All tokens but the codes of pictures must be equal,
which compares captions, classes and boxes; codes may differ by rounding on another device. Masks
are also decoded from the sample's tokens and compared with the annotation in pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from icl_moe.data.location import MANIFEST_FILE
from icl_moe.data.shards import Manifest, Sample, ShardSet
from icl_moe.devices import Device
from icl_moe.errors import InputError, shown
from icl_moe.processes import join_processes
from icl_moe.sequence import Episode, SequenceCodec, TokenSequence
from icl_moe.settings import from_dict
from icl_moe.tasks import SEGMENTATION, SEMANTIC_SEGMENTATION, TASKS
from icl_moe.tasks.mask_scores import mask_iou
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from preprocessing.episode_file import read_episodes
from preprocessing.image_check import Item
from preprocessing.pool import Pool, PoolRegion
from preprocessing.quantize import CropPicture, pictures_of
from preprocessing.recipe import DataRecipe
from preprocessing.sources import Reading, read_pools
from preprocessing.standard_pools import read_fixed_pool
from preprocessing.verify import open_codec

LEAST_EQUAL_CODES = 0.9
"""The least share of a picture's codes that must be equal. bf16 and other devices change a few in a
thousand, and a few in a hundred of features codes of further stages; another picture nearly all.
"""

MOST_LOST_IOU = 0.02
"""How far the IoU of a mask that was decoded from a sample's tokens may be below that of the
annotation encoded and decoded anew, which is the tokenizer's ceiling.
"""


@dataclass
class Comparison:
    """What was compared of a task. codes: the share of equal codes of each picture. ious, ceilings:
    of each mask, decoded from the sample's tokens, and encoded anew. texts: the number of tokens
    that are no codes of pictures, which were equal. without_images: the samples that were not
    compared since their images are gone.
    """

    samples: int = 0
    without_images: int = 0
    pairs: int = 0
    texts: int = 0
    codes: list[float] = field(default_factory=list)
    ious: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)

    def sentence(self, task: str) -> str:
        gone = f" ({self.without_images} others lack their images)" * bool(self.without_images)
        if not self.samples:
            return f"{task}: no sample was compared with its sources{gone}."
        parts = [
            f"{task}: {self.samples} samples ({self.pairs} pairs){gone} made anew from the "
            f"sources: {self.texts} tokens of classes, boxes, captions and markers are equal, and "
            f"{np.mean(self.codes):.2%} of the codes of pictures"
        ]
        if self.ious:
            parts.append(
                f"masks decoded from tokens have a mean IoU of {np.mean(self.ious):.3f} with their "
                f"annotations (the tokenizer's ceiling is {np.mean(self.ceilings):.3f})"
            )
        return "; ".join(parts) + "."


def compare_with_sources(
    location: str | Path, samples: int, workers: int, device: Device | None = None, seed: int = 0
) -> list[str]:
    """Compare up to `samples` random samples of each task, and say in a sentence for each task what
    was compared, or why nothing could be.

    Raises InputError that names the first sample that differs from its sources.
    """
    shards = ShardSet(location)
    recipe = from_dict(DataRecipe, shards.manifest.recipe, MANIFEST_FILE)
    folder = Path(location)
    if (gone := _missing_source(recipe, folder, shards.manifest.standard)) is not None:
        return [f"The sources are not here ({gone}), so samples were not compared with them."]
    process = join_processes(device)
    existing = _Existing(shards.manifest.bad_images)
    chosen = {
        task: np.sort(
            np.random.default_rng([seed, count]).choice(count, min(samples, count), replace=False)
        ).tolist()
        for task, count in shards.manifest.samples.items()
    }
    wanted = {task: _keys(shards, task, numbers) for task, numbers in chosen.items()}
    reading = Reading(recipe.image_size, existing, workers, folder)
    if recipe.episodes is None:
        pools = read_pools(recipe.with_scenes_in(folder / "synthetic"), reading)
    else:
        pools = iter([_fixed_pool(recipe, chosen, reading, existing)])
    regions = {pool.task: _by_source(pool, wanted[pool.task]) for pool in pools}
    comparer = _Comparer(shards, process, existing.missing)
    return [
        comparer.compare(regions[task], task, numbers).sentence(task)
        for task, numbers in chosen.items()
    ]


def _fixed_pool(
    recipe: DataRecipe, chosen: Mapping[str, list[int]], reading: Reading, existing: "_Existing"
) -> Pool:
    """The regions of the chosen ones of a file's episodes."""
    fixed = read_episodes(Path(str(recipe.episodes)))
    fixed = replace(fixed, episodes=tuple(fixed.episodes[n] for n in chosen[fixed.task]))
    folder, usable = Path(str(recipe.episodes_data)), _Noted(existing)
    return read_fixed_pool(fixed, folder, recipe.image_size, usable, reading.workers).pool


def _missing_source(
    recipe: DataRecipe, folder: Path, standard: Mapping[str, Any] | None
) -> str | None:
    """The first file or folder of a recipe's sources that is not on this machine, and why.
    standard: the manifest's.
    """
    for name, path in (("episodes", recipe.episodes), ("episodes_data", recipe.episodes_data)):
        if path is not None and not Path(path).exists():
            return f"{name}: {path} does not exist"
    if recipe.episodes is not None:
        found = read_episodes(Path(recipe.episodes)).header()
        if standard is None or found["sha256"] != standard.get("sha256"):
            return f"episodes: {recipe.episodes} is not the file that the shards were built of"
    for name, section in (("segmentation", recipe.segmentation), ("captioning", recipe.captioning)):
        if section is None:
            continue
        if section.source == "synthetic" and not (folder / "synthetic").is_dir():
            return f"{folder / 'synthetic'} does not exist"
        if section.source == "composed" and not (folder / "composed").is_dir():
            return f"{folder / 'composed'} does not exist"
        for key, source in section.paths().items():
            if not source.exists():
                return f"{name}.{key}: {source} does not exist"
    return None


class _Existing:
    """Treats images as usable if they exist, unless the build could not use them, and keeps the
    names of those that are missing. bad: the manifest's.
    """

    def __init__(self, bad: Mapping[str, dict[str, str]]) -> None:
        self.missing: set[str] = set()
        # Both tasks come from one section, whose images are checked for segmentation.
        of_masks = [bad.get(task.name, {}) for task in (SEGMENTATION, SEMANTIC_SEGMENTATION)]
        self._bad = {**bad, SEGMENTATION.name: of_masks[0] | of_masks[1]}

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        items = list(items)
        self.missing |= {item.image.name for item in items if not item.image.path.is_file()}
        bad = self._bad.get(pool.task, {})
        return [item for item in items if item.image.name not in self.missing | bad.keys()]


@dataclass(frozen=True)
class _Noted:
    """Treats every image as usable, and has `existing` keep the names of those that are missing."""

    existing: _Existing

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        items = list(items)
        self.existing.keep(items, folder, pool)
        return items


Regions = dict[tuple[Any, ...], list[PoolRegion]]
"""The regions of a pool by `_key`; several where two folders of images have a name in common."""


def _keys(shards: ShardSet, task: str, numbers: list[int]) -> set[tuple[Any, ...]]:
    """The keys of the regions of some samples."""
    samples = (shards.sample(task, number) for number in numbers)
    return {_key_of(sample, source) for sample in samples for source in sample.meta["sources"]}


def _by_source(pool: Pool, wanted: set[tuple[Any, ...]]) -> Regions:
    """The regions of the wanted keys; a large pool has far more than memory holds as objects."""
    found: Regions = {}
    for region in pool.regions:
        key = _key(
            region.image.name, region.category, region.style, region.annotations, region.provenance
        )
        if key in wanted:
            found.setdefault(key, []).append(region)
    return found


def _key_of(sample: Sample, source: dict[str, Any]) -> tuple[Any, ...]:
    style, annotations = str(sample.meta.get("style", "")), source["annotations"]
    return _key(source["image"], sample.category, style, annotations, source.get("provenance"))


def _key(
    image: str, category: str, style: str, annotations: Sequence[Any], provenance: Any
) -> tuple[Any, ...]:
    return image, category, style, tuple(annotations), bool(provenance)


@dataclass
class _Comparer:
    shards: ShardSet
    process: PartialState
    missing: set[str]

    def __post_init__(self) -> None:
        manifest = self.shards.manifest
        folders = {name: self.shards.fetch(name) for name in manifest.tokenizer_folders}
        self._codec: SequenceCodec = open_codec(self.shards)
        self._tokenizers = ImageTokenizers.from_folders(folders).to(self.process.device)

    @property
    def _manifest(self) -> Manifest:
        return self.shards.manifest

    def compare(self, regions: Regions, task: str, chosen: list[int]) -> Comparison:
        found = Comparison()
        for index in tqdm(chosen, desc=f"comparing {task}", unit="sample"):
            sample = self.shards.sample(task, index)
            if self._lacks_images(sample, regions):
                found.without_images += 1
                continue
            try:
                self._compare_sample(sample, regions, found)
            except InputError as error:
                raise InputError(
                    f"{self.shards.location}/{sample.shard}: sample {sample.key} differs from its "
                    f"sources: {error}"
                ) from error
        return found

    def _lacks_images(self, sample: Sample, regions: Regions) -> bool:
        """Whether images are missing that it shows; or, since the images that are asked for absent
        classes are drawn from all of them, any that could make another draw of its query.
        """
        *_, query = sources = sample.meta["sources"]
        redrawn = not query["annotations"] and _key_of(sample, query) not in regions
        return any(source["image"] in self.missing for source in sources) or (
            redrawn and bool(self.missing)
        )

    def _compare_sample(self, sample: Sample, regions: Regions, found: Comparison) -> None:
        task, pairs = TASKS[sample.task], []
        for source in sample.meta["sources"]:
            region = _region_of(sample, source, regions)
            region = replace(region, target=task.target_of(region.target, sample.meta))
            pictures = pictures_of(region, task, self._codec.format)
            drawn = [picture.draw(self._manifest.image_size) for picture in pictures]
            are_inputs = [isinstance(picture, CropPicture) for picture in pictures]
            codes = self._tokenizers.encode(drawn, are_inputs, self.process.device)
            image, *others = codes.astype(np.int64)
            pairs.append(
                task.pair(self._codec.format, region.category, image, region.target, others)
            )
            if sample.task == "segmentation":
                self._compare_mask(sample, len(pairs) - 1, drawn[1], others[0], found)
        again = self._codec.encode(Episode(task, sample.category, tuple(pairs)))
        found.samples += 1
        found.pairs += len(pairs)
        _compare_tokens(sample.sequence, again, self._codec, found)

    def _compare_mask(
        self,
        sample: Sample,
        number: int,
        annotated_HW: np.ndarray,
        codes_N: np.ndarray,
        found: Comparison,
    ) -> None:
        """Compare the mask of a pair, decoded from the sample's tokens, with the annotation."""
        written = self._codec.decode(sample.sequence, TASKS[sample.task]).pairs[number].mask
        brightness_2HW = self._tokenizers.mask_writer.decode(np.stack([written, codes_N]))
        drawn_2HW = (brightness_2HW > 0).cpu().numpy()
        iou, ceiling = (mask_iou(drawn_HW, annotated_HW) for drawn_HW in drawn_2HW)
        if iou < ceiling - MOST_LOST_IOU:
            raise InputError(
                f"the mask of its pair {number} has an IoU of {iou:.3f} with the annotation; "
                f"encoded anew it has {ceiling:.3f}."
            )
        found.ious.append(iou)
        found.ceilings.append(ceiling)


def _region_of(sample: Sample, source: dict[str, Any], regions: Regions) -> PoolRegion:
    annotations, found = source["annotations"], regions.get(_key_of(sample, source), [])
    if not found:
        raise InputError(
            f"the sources have no region of {sample.category} in {source['image']} with the "
            f"annotations {shown(annotations)}."
        )
    for region in found:
        if list(region.crop) == list(source["crop"]):
            return region
    raise InputError(
        f"its part of {source['image']} is {source['crop']}, that of the sources is "
        f"{list(found[0].crop)}."
    )


def _compare_tokens(
    sequence: TokenSequence, again: TokenSequence, codec: SequenceCodec, found: Comparison
) -> None:
    """Raise InputError if tokens differ that are no codes, or too many codes of a picture do."""
    if sequence.spans != again.spans:
        raise InputError("its spans are not those of the sources; a text or a box differs.")
    vocabulary = codec.format.vocabulary
    then_L, now_L = sequence.tokens_L.astype(np.int64), again.tokens_L.astype(np.int64)
    pictured_L = vocabulary.are_codes(now_L)
    for span in sequence.spans:
        part = slice(span.start, span.stop)
        coded, equal = pictured_L[part], then_L[part] == now_L[part]
        if coded.any():
            # Of features codes of several stages, each stage's code counts for itself.
            then, now = (vocabulary.rows(tokens_L[part][coded]) for tokens_L in (then_L, now_L))
            found.codes.append(float((then == now).mean()) if len(then) == len(now) else 0.0)
            if found.codes[-1] < LEAST_EQUAL_CODES:
                raise InputError(
                    f"only {found.codes[-1]:.0%} of the codes of a picture (tokens {span.start} to "
                    f"{span.stop - 1}) are those of the sources."
                )
        if not equal[~coded].all():
            place = span.start + int(np.flatnonzero(~equal & ~coded)[0])
            raise InputError(
                f"its token {place} is {then_L[place]}, that of the sources is {now_L[place]}; a "
                "caption, a class or a box differs."
            )
        found.texts += int((~coded).sum())
