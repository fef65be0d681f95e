"""Time and memory of building shards of data sets of the size of COCO and Visual Genome, without
the images and their tokenizer:

    python benchmarks/data_size.py --scale 0.1 [--data coco genome] [--out DIR] [--workers 2]
        [--samples 20000] [--json FILE]

Writes annotation files of their form and, at scale 1, of their size (COCO train2017: 118,287 images
with 860,001 instances of 80 classes; Visual Genome 1.4: 108,077 images with 5.4 million regions and
3.8 million objects), with random content, unless DIR holds them. For each, in a process of its own,
reads them into its pool, plans the episodes of the recipe coco_vg_256, and packs some of them.
Images are neither made nor read, and their codes are a constant. The goals are those of scale 1: a
pool within ten minutes and 4 GB, and 20,000 samples packed a second. Core-seconds are the time of
all processes on processors; unlike seconds, they hardly change where others compute too.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from measure import Goal, report, run_apart

from icl_moe.sequence import SequenceCodec
from icl_moe.settings import load_recipe
from icl_moe.tasks import TASKS
from icl_moe.tokenizers.text import TextTokenizer
from preprocessing import plan
from preprocessing.classes import COCO_CLASSES
from preprocessing.coco import read_segmentation
from preprocessing.image_check import Item
from preprocessing.pack import Packer, TaskEpisodes, pack_shard, shard_ranges
from preprocessing.pool import Pool
from preprocessing.recipe import DataRecipe
from preprocessing.visual_genome import read_captioning
from preprocessing.workers import ordered_map

COCO_IMAGES, INSTANCES = 118_287, 860_001
GENOME_IMAGES, REGIONS, OBJECTS = 108_077, 5_400_000, 3_800_000

WIDTH, HEIGHT = 640, 480
MINUTES, GIGABYTES, EPISODES = 10.0, 4.0, 20_000.0
CODES = 256
_COLOURS = ("red", "blue", "small", "large", "wooden", "white")
_PLACES = ("on the grass", "near the road", "in the room", "under a tree", "by the water")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--data", nargs="+", choices=("coco", "genome"), default=["coco", "genome"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20_000, help="how many samples to pack")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", choices=("coco", "genome"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(build(args.out, args.read, args.workers, args.samples)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        write(folder, args.scale, args.data)
        figures: dict[str, Any] = {"scale": args.scale, "workers": args.workers}
        goals = []
        for name in args.data:
            command = ["--read", name, "--out", str(folder), "--workers", str(args.workers)]
            line, mebibytes = run_apart([__file__, *command, "--samples", str(args.samples)])
            found = json.loads(line)
            figures |= {f"{name}: {key}": value for key, value in found.items()}
            figures[f"{name}: peak memory of a process, GiB"] = mebibytes / 1024
            minutes = found["pool: seconds"] / 60 / args.scale
            before = found["peak memory before, GiB"]
            memory = before + (mebibytes / 1024 - before) / args.scale
            goals += [
                Goal(f"{name}: minutes for the pool / scale", minutes, MINUTES, at_most=True),
                Goal(f"{name}: GiB a process at scale 1", memory, GIGABYTES, at_most=True),
                Goal(
                    f"{name}: samples packed a second", found["samples packed a second"], EPISODES
                ),
            ]
    report(figures, goals, args.json)


def build(folder: Path, name: str, workers: int, samples: int) -> dict[str, float]:
    """Read a pool, plan its episodes, and pack some of them. Returns the figures of each."""
    recipe, figures = _recipe(folder, name), dict[str, float]()
    codec = SequenceCodec(recipe.sequence_format(CODES), TextTokenizer())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures["peak memory before, GiB"] = peak / 2**20
    with _timed("pool", figures):
        pool = _read(recipe, workers)
    figures["pool: regions"] = len(pool.regions)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary)
        plan.ImageCheck = AllUsable  # type: ignore[assignment,misc]
        plan.read_pools = lambda *_: iter([pool])  # type: ignore[assignment]
        planner = plan.Planner(recipe, codec, out, out, workers, None, lambda _: None)
        with _timed("plan", figures):
            planned = planner.plan(PartialState(cpu=True))
        episodes = planned.episodes[pool.task]
        figures["plan: episodes"] = len(episodes)
        files = [path for path in (out / "plan").rglob("*") if path.is_file()]
        figures["plan: MiB on the disk"] = sum(path.stat().st_size for path in files) / 2**20
        with _timed("packing", figures):
            count = _pack(planned, codec, out, workers, min(samples, len(episodes)))
        figures["samples packed a second"] = count / figures["packing: seconds"]
        figures["samples packed a core-second"] = count / figures["packing: core-seconds"]
    return figures


def _recipe(folder: Path, name: str) -> DataRecipe:
    settings = [f"segmentation.annotations={folder}/instances.json", "captioning=null"]
    if name == "genome":
        files = {"regions": "region_descriptions", "objects": "objects", "image_data": "image_data"}
        settings = [f"captioning.{key}={folder}/{file}.json" for key, file in files.items()]
        settings = [*settings, "captioning.images=.", "segmentation=null"]
    return load_recipe(DataRecipe, "coco_vg_256", settings, package="preprocessing")


def _read(recipe: DataRecipe, workers: int) -> Pool:
    if recipe.segmentation is not None:
        size = recipe.image_size
        return read_segmentation(recipe.segmentation, size, AllUsable(), workers)
    assert recipe.captioning is not None
    return read_captioning(recipe.captioning, AllUsable(), workers)


def _pack(planned: plan.Plan, codec: SequenceCodec, out: Path, workers: int, samples: int) -> int:
    ((name, pool),) = planned.pools.items()
    episodes, pictures = planned.episodes[name], planned.pictures[name]
    tasks = {name: TaskEpisodes(TASKS[name], pool.regions, episodes, pictures)}
    packer = Packer(out, out, codec, _Codes(), tasks, 256)  # type: ignore[arg-type]
    shards = shard_ranges(name, samples, 1024)
    return sum(ordered_map(pack_shard, packer, shards, workers))


class _Codes:
    """A substitute for the store of codes."""

    def __getitem__(self, number: int) -> np.ndarray:
        return _CONSTANT


_CONSTANT = np.zeros(CODES, dtype=np.int64)


@contextmanager
def _timed(stage: str, figures: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of the context, and the core-seconds of this process and its children."""
    started, used = time.perf_counter(), _core_seconds()
    yield
    figures[f"{stage}: seconds"] = time.perf_counter() - started
    figures[f"{stage}: core-seconds"] = _core_seconds() - used


def _core_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class AllUsable:
    """Treats every image as usable, since there are none."""

    def __init__(self, *_: object) -> None:
        self.seen = set[Path]()

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        return list(items)


# --- Files of the true form ----------------------------------------------------------------------


def write(folder: Path, scale: float, data: Iterable[str] = ("coco", "genome")) -> None:
    """Write the files of data sets that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, Iterable[str], str]] = {
        "instances.json": ("", _instances(scale), ""),
        "image_data.json": ("[", _separated(_image_data(scale)), "]"),
        "objects.json": ("[", _separated(_objects(scale)), "]"),
        "region_descriptions.json": ("[", _separated(_regions(scale)), "]"),
    }
    wanted = [name for name in files if ("coco" if name == "instances.json" else "genome") in data]
    for name, (before, parts, after) in ((name, files[name]) for name in wanted):
        if not (folder / name).is_file():
            partial = folder / f"{name}.partial"
            with partial.open("w", encoding="utf-8") as file:
                file.write(before)
                file.writelines(parts)
                file.write(after)
            partial.rename(folder / name)


def _separated(records: Iterable[Any]) -> Iterator[str]:
    for number, record in enumerate(records):
        yield ("" if number == 0 else ", ") + json.dumps(record)


def _instances(scale: float) -> Iterator[str]:
    images, instances = round(COCO_IMAGES * scale), round(INSTANCES * scale)
    yield '{"info": {"description": "as COCO 2017"}, "licenses": [], "images": ['
    yield from _separated(
        {
            "license": 1,
            "file_name": f"{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{number}_z.jpg",
            "id": number,
        }
        for number in range(1, images + 1)
    )
    yield '], "annotations": ['
    yield from _separated(_annotations(images, instances))
    yield '], "categories": ['
    yield from _separated(
        {"supercategory": "thing", "id": number, "name": name}
        for number, name in enumerate(COCO_CLASSES, start=1)
    )
    yield "]}"


def _annotations(images: int, instances: int) -> Iterator[dict[str, Any]]:
    """Outlines of 10 to 50 points, one in a hundred a crowd in run lengths; three classes an
    image.
    """
    rng = np.random.default_rng(0)
    shares = np.cumsum(1 / np.arange(1, len(COCO_CLASSES) + 1))
    of_images = np.searchsorted(shares, rng.uniform(0, shares[-1], (images, 3))) + 1
    for number in range(1, instances + 1):
        x, y = rng.uniform(0, WIDTH - 60), rng.uniform(0, HEIGHT - 60)
        w, h = rng.uniform(8, WIDTH - x), rng.uniform(8, HEIGHT - y)
        image = int(rng.integers(images))
        annotation = {
            "image_id": image + 1,
            "bbox": np.round([x, y, w, h], 2).tolist(),
            "category_id": int(of_images[image, rng.integers(3)]),
            "id": number,
            "area": round(w * h / 2, 4),
            "iscrowd": int(number % 100 == 0),
        }
        if annotation["iscrowd"]:
            runs = rng.multinomial(WIDTH * HEIGHT, np.full(201, 1 / 201)).tolist()
            annotation["segmentation"] = {"counts": runs, "size": [HEIGHT, WIDTH]}
        else:
            turns = np.linspace(0, 2 * np.pi, int(rng.integers(10, 51)), endpoint=False)
            outline = np.stack(
                [x + w / 2 * (1 + np.cos(turns)), y + h / 2 * (1 + np.sin(turns))], 1
            )
            annotation["segmentation"] = [outline.round(2).ravel().tolist()]
        yield annotation


def _image_data(scale: float) -> Iterator[dict[str, Any]]:
    for number in range(1, round(GENOME_IMAGES * scale) + 1):
        url = f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg"
        size = {"width": WIDTH, "height": HEIGHT}
        yield {"image_id": number, "url": url, **size, "coco_id": None, "flickr_id": None}


def _boxes(number: int) -> list[tuple[str, tuple[int, ...]]]:
    """The objects of an image: name, and x, y, width and height."""
    rng = np.random.default_rng([1, number])
    count = OBJECTS // GENOME_IMAGES
    names = rng.choice(COCO_CLASSES + ("tree", "sky", "wall", "shirt") * 20, count).tolist()
    return [
        (name, (x, y, int(rng.integers(10, WIDTH - x)), int(rng.integers(10, HEIGHT - y))))
        for name, x, y in zip(
            names,
            rng.integers(0, WIDTH - 40, count).tolist(),
            rng.integers(0, HEIGHT - 40, count).tolist(),
            strict=True,
        )
    ]


def _objects(scale: float) -> Iterator[dict[str, Any]]:
    for number in range(1, round(GENOME_IMAGES * scale) + 1):
        objects = [
            {
                "synsets": [f"{name}.n.01"],
                "h": h,
                "object_id": 100 * number + place,
                "merged_object_ids": [],
                "names": [name],
                "w": w,
                "y": y,
                "x": x,
            }
            for place, (name, (x, y, w, h)) in enumerate(_boxes(number))
        ]
        url = f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg"
        yield {"image_id": number, "objects": objects, "image_url": url}


def _regions(scale: float) -> Iterator[dict[str, Any]]:
    for number in range(1, round(GENOME_IMAGES * scale) + 1):
        rng, objects = np.random.default_rng([2, number]), _boxes(number)
        regions = []
        for place in range(REGIONS // GENOME_IMAGES):
            name, (x, y, w, h) = objects[int(rng.integers(len(objects)))]
            words = f"a {rng.choice(_COLOURS)} {name} {rng.choice(_PLACES)}"
            regions.append(
                {
                    "region_id": 100 * number + place,
                    "width": max(w - int(rng.integers(8)), 1),
                    "height": max(h - int(rng.integers(8)), 1),
                    "image_id": number,
                    "phrase": words,
                    "y": y,
                    "x": x,
                }
            )
        yield {"id": number, "regions": regions}


if __name__ == "__main__":
    sys.exit(main())
