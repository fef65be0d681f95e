"""Where the regions of a task come from: the registry of readers by task and name of the source.

A data recipe has a section for each task. Those of segmentation and captioning are keys of the
recipe. A task of another package has its section under `tasks`, and registers the settings of that
section and their reader here:

    register_source("edges", "folder", EdgesFolder, read_edges)

    tasks:
      edges: {source: folder, images: pictures}
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from icl_moe.errors import InputError, nearest
from icl_moe.settings import from_dict
from icl_moe.tasks import find_task
from preprocessing import (
    coco,
    coco_captions,
    composed,
    folder,
    instance_captions,
    jsonl,
    lvis,
    visual_genome,
)
from preprocessing.image_check import UsableImages
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource, DataRecipe, SegmentationSource
from preprocessing.region_table import RegionTable
from preprocessing.several_classes import combine_classes


@dataclass(frozen=True)
class Reading:
    """What readers receive besides their settings.

    image_size: side in pixels of the model's images. usable: which images can be used. workers:
    processes that may read. folder: the shard folder, in which a source may keep files that it
    generates.
    """

    image_size: int
    usable: UsableImages
    workers: int
    folder: Path


Reader = Callable[[Any, Reading], Pool]
"""Reads a task's pool as the settings of its section say."""


class _Source(NamedTuple):
    settings: type
    read: Reader
    files: tuple[str, ...] | None


_SOURCES: dict[str, dict[str, _Source]] = {}


def register_source(
    task: str, name: str, settings: type, read: Reader, files: tuple[str, ...] | None = None
) -> None:
    """Register a source of a task. settings: a frozen dataclass, the keys of the recipe's section
    besides `source`. files: the keys that name all that it reads besides images; a build that is
    resumed reads it again only if one of these files has changed, otherwise (None) each time. The
    first source of a task is its default.
    """
    _SOURCES.setdefault(task, {})[name] = _Source(settings, read, files)


def named_files(recipe: DataRecipe) -> list[Path] | None:
    """The files that the sources of a recipe read besides images; None if they are not known."""
    found = []
    for task, section in (
        ("segmentation", recipe.segmentation),
        ("captioning", recipe.captioning),
    ):
        if section is not None:
            keys = _SOURCES[task][section.source].files
            if keys is None:
                return None
            values = [getattr(section, key) for key in keys]
            found += [Path(value) for value in values if value is not None]
    return found if not recipe.tasks and all(map(Path.is_file, found)) else None


def read_pools(recipe: DataRecipe, reading: Reading) -> Iterator[Pool]:
    """The pool of each task of a recipe. Raises InputError if anything in its files is wrong."""
    if recipe.segmentation is not None:
        source = recipe.segmentation
        pool = _SOURCES["segmentation"][source.source].read(source, reading)
        if source.absent and len(pool.regions) and not pool.absent:
            raise InputError(
                f"segmentation.absent={source.absent:g} makes no query: each image shows every "
                "class, or this is too small a share of so few regions. Set it to 0, or higher."
            )
        if source.classes_per_mask > 1:
            pool = combine_classes(
                pool,
                source.classes_per_mask,
                source.least_scale,
                reading.image_size,
                reading.workers,
            )
        yield pool
    if recipe.captioning is not None:
        yield _SOURCES["captioning"][recipe.captioning.source].read(recipe.captioning, reading)
    for task, values in recipe.tasks.items():
        name, settings = _section(task, values)
        yield _SOURCES[task][name].read(settings, reading)


def check_sections(recipe: DataRecipe) -> None:
    """Raise InputError if a section under `tasks` has an unknown task or source, or wrong keys."""
    for task, values in recipe.tasks.items():
        _section(task, values)


def _section(task: str, values: Any) -> tuple[str, Any]:
    """The source of a section under `tasks`, and its settings."""
    find_task(task, "tasks")
    sources = _SOURCES.get(task, {})
    if not isinstance(values, dict):
        raise InputError(f"tasks.{task} must hold keys and values, not {values!r}.")
    keys = dict(values)
    name = keys.pop("source", next(iter(sources), None))
    if name not in sources:
        raise InputError(
            f"tasks.{task}.source names {name}{nearest(str(name), sources)}; known are "
            f"{', '.join(sources) or 'none'}."
        )
    return name, from_dict(sources[name].settings, keys, f"tasks.{task}")


def _read_coco(source: SegmentationSource, reading: Reading) -> Pool:
    pool = coco.read_segmentation(source, reading.image_size, reading.usable, reading.workers)
    if source.examples_annotations is None:
        return pool
    others = replace(
        source,
        images=source.examples_images,
        annotations=source.examples_annotations,
        absent=0.0,  # An example shows its class.
    )
    other_pool = coco.read_segmentation(others, reading.image_size, reading.usable, reading.workers)
    queries, examples = (RegionTable.of(part.regions) for part in (pool, other_pool))
    pool.regions = RegionTable.concatenate(
        [queries.with_role("query"), examples.with_role("example")]
    )
    pool.skipped += other_pool.skipped
    pool.bad_images |= other_pool.bad_images
    return pool


def _read_folder(source: SegmentationSource, reading: Reading) -> Pool:
    return folder.read_segmentation(source, reading.image_size, reading.usable, reading.workers)


def _read_lvis(source: SegmentationSource, reading: Reading) -> Pool:
    return lvis.read_segmentation(source, reading.image_size, reading.usable, reading.workers)


def _read_lines(source: SegmentationSource, reading: Reading) -> Pool:
    return jsonl.read_segmentation(source, reading.image_size, reading.usable, reading.workers)


def _read_captioned_lines(source: CaptioningSource, reading: Reading) -> Pool:
    return jsonl.read_captioning(source, reading.usable)


def _read_composed(source: SegmentationSource, reading: Reading) -> Pool:
    album = composed.open_album(source, reading.usable, reading.workers)
    made = composed.compose_images(
        album, source.composed, reading.image_size, reading.folder / "composed", reading.workers
    )
    return composed.read_segmentation(album, source, reading.image_size, made, reading.workers)


def _read_visual_genome(source: CaptioningSource, reading: Reading) -> Pool:
    return visual_genome.read_captioning(source, reading.usable, reading.workers)


def _read_coco_captions(source: CaptioningSource, reading: Reading) -> Pool:
    return coco_captions.read_captioning(source, reading.usable)


def _read_instance_captions(source: CaptioningSource, reading: Reading) -> Pool:
    return instance_captions.read_captioning(source, reading.usable)


_GENOME = ("regions", "objects", "image_data", "splits")
_CAPTIONS = ("annotations", "instances")
register_source(
    "segmentation", "coco", SegmentationSource, _read_coco, ("annotations", "examples_annotations")
)
register_source("segmentation", "lvis", SegmentationSource, _read_lvis, ("annotations",))
register_source("segmentation", "folder", SegmentationSource, _read_folder)
register_source("segmentation", "jsonl", SegmentationSource, _read_lines)
register_source("segmentation", "composed", SegmentationSource, _read_composed)
register_source("captioning", "visual_genome", CaptioningSource, _read_visual_genome, _GENOME)
register_source("captioning", "coco_captions", CaptioningSource, _read_coco_captions, _CAPTIONS)
register_source(
    "captioning", "instance_captions", CaptioningSource, _read_instance_captions, _CAPTIONS
)
register_source("captioning", "jsonl", CaptioningSource, _read_captioned_lines)
