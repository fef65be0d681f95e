"""Writes shard folders of random episodes with the real packer, for measurements that depend only
on size and layout.
"""

from pathlib import Path

import numpy as np

from icl_moe.data.location import FileInfo
from icl_moe.data.shards import SCHEMA_VERSION, Manifest, index_file
from icl_moe.sequence import SequenceCodec, SequenceFormat
from icl_moe.tasks import CAPTIONING, SEGMENTATION, Task
from icl_moe.tasks.captioning import CaptionTarget
from icl_moe.tasks.segmentation import MaskTarget
from icl_moe.tokenizers.text import TextTokenizer
from preprocessing.pack import Packer, TaskEpisodes, collect, pack_shard, shard_ranges
from preprocessing.pool import ImageFile, PoolRegion

_WORDS = [
    "a",
    "the",
    "of",
    "red",
    "blue",
    "small",
    "large",
    "old",
    "dog",
    "cat",
    "horse",
    "man",
    "woman",
    "tree",
    "car",
    "street",
    "field",
    "water",
    "sky",
    "with",
    "and",
    "on",
    "in",
    "near",
    "behind",
]
_CLASSES = ("dog", "cat", "horse", "person", "car")


def write_shards(
    folder: Path,
    format: SequenceFormat,
    samples: int,
    shard_size: int,
    examples: int = 3,
    mask_bytes: int = 300,
) -> Manifest:
    """Write `samples` episodes of each task into `folder`. mask_bytes: the size of a mask's run
    lengths in KEY.json.
    """
    folder.mkdir(parents=True)
    codec = SequenceCodec(format, TextTokenizer(format.vocabulary.text_merges))
    rng = np.random.default_rng(0)
    regions = {SEGMENTATION: _with_masks(mask_bytes), CAPTIONING: _with_captions(rng)}
    tasks = {
        task.name: _episodes(task, of_task, samples, examples + 1, format, rng)
        for task, of_task in regions.items()
    }
    image_size = 16 * int(format.codes_per_image**0.5)
    pictures = max(int(of_task.pictures.max()) for of_task in tasks.values()) + 1
    codes = rng.integers(0, format.vocabulary.image_codes, (pictures, format.codes_per_image))
    packer = Packer(folder, folder, codec, codes, tasks, image_size)  # type: ignore[arg-type]
    ranges = [shard for task in tasks for shard in shard_ranges(task, samples, shard_size)]
    for shard in ranges:
        pack_shard(packer, shard)
    shards, classes = collect(packer, ranges)
    manifest = Manifest(
        SCHEMA_VERSION,
        format,
        examples,
        image_size,
        "",
        "",
        {},
        dict.fromkeys(tasks, samples),
        classes,
        shards,
        {},
        tuple(FileInfo.of(folder, index_file(task)) for task in tasks),
    )
    manifest.write(folder)
    return manifest


def _with_masks(mask_bytes: int) -> list[PoolRegion]:
    return [
        PoolRegion(
            ImageFile(Path(), f"{n:012d}.jpg", 640, 480),
            category,
            (n,),
            (80, 0, 560, 480),
            0.25,
            MaskTarget(b"0" * mask_bytes),
        )
        for n, category in enumerate(_CLASSES)
    ]


def _with_captions(rng: np.random.Generator) -> list[PoolRegion]:
    """Phrases of Visual Genome's length, 5 words on average."""
    regions = []
    for n in range(200):
        category = _CLASSES[n % len(_CLASSES)]
        phrase = " ".join(rng.choice(_WORDS, size=int(rng.integers(2, 9))))
        image = ImageFile(Path(), f"VG_100K/{n}.jpg", 800, 600)
        regions.append(
            PoolRegion(
                image,
                category,
                (n,),
                (0, 0, 800, 600),
                0.1,
                CaptionTarget((0.1, 0.2, 0.5, 0.75), phrase, (phrase,)),
            )
        )
    return regions


def _episodes(
    task: Task,
    regions: list[PoolRegion],
    samples: int,
    pairs: int,
    format: SequenceFormat,
    rng: np.random.Generator,
) -> TaskEpisodes:
    """Pictures 2n and 2n + 1 are the image of region n, and its mask or drawn box."""
    pictures = np.arange(2 * len(regions)).reshape(-1, 2)
    if "image" not in task.outputs(format):
        pictures[:, 1] = -1
    return TaskEpisodes(task, regions, rng.integers(0, len(regions), (samples, pairs)), pictures)
