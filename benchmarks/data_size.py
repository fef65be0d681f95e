"""Time and memory of reading data sets of the size of COCO and Visual Genome:

    python benchmarks/data_size.py --scale 0.1 [--out DIR] [--workers 2] [--json FILE]

Writes annotation files of their form and, at scale 1, of their size (COCO train2017: 118,287 images
with 860,001 instances of 80 classes; Visual Genome 1.4: 108,077 images with 5.4 million regions and
3.8 million objects), with random content, unless DIR holds them. Reads each into its pool in a
process of its own, and plans an episode for each of its regions. Images are neither made nor read.
The goals are those of scale 1: a pool within ten minutes and 4 GB, and 20,000 episodes a second.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import Goal, report, run_apart

from preprocessing.classes import COCO_CLASSES
from preprocessing.coco import read_segmentation
from preprocessing.episodes import plan_episodes
from preprocessing.image_check import Item
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource, SegmentationSource
from preprocessing.visual_genome import read_captioning

COCO_IMAGES, INSTANCES = 118_287, 860_001
GENOME_IMAGES, REGIONS, OBJECTS = 108_077, 5_400_000, 3_800_000

WIDTH, HEIGHT = 640, 480
MINUTES, GIGABYTES, EPISODES = 10.0, 4.0, 20_000.0
_COLOURS = ("red", "blue", "small", "large", "wooden", "white")
_PLACES = ("on the grass", "near the road", "in the room", "under a tree", "by the water")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", choices=("coco", "genome"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.out, args.read, args.workers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        write(folder, args.scale)
        figures: dict[str, Any] = {"scale": args.scale, "workers": args.workers}
        goals = []
        for name in ("coco", "genome"):
            command = ["--read", name, "--out", str(folder), "--workers", str(args.workers)]
            line, mebibytes = run_apart([__file__, *command])
            found = json.loads(line)
            figures |= {f"{name}: {key}": value for key, value in found.items()}
            figures[f"{name}: peak memory of a process, GiB"] = mebibytes / 1024
            minutes = found["seconds for the pool"] / 60 / args.scale
            goals += [
                Goal(f"{name}: minutes for the pool / scale", minutes, MINUTES, at_most=True),
                Goal(
                    f"{name}: GiB a process / scale",
                    mebibytes / 1024 / args.scale,
                    GIGABYTES,
                    at_most=True,
                ),
                Goal(f"{name}: episodes planned a second", found["episodes a second"], EPISODES),
            ]
    report(figures, goals, args.json)


def read(folder: Path, name: str, workers: int) -> dict[str, float]:
    """Read a pool and plan its episodes. Returns the figures of both."""
    started = time.perf_counter()
    if name == "coco":
        source = SegmentationSource(images=str(folder), annotations=str(folder / "instances.json"))
        pool = read_segmentation(source, 256, AllUsable(), workers)
    else:
        files = {key: str(folder / f"{key}.json") for key in ("objects", "image_data")}
        regions = str(folder / "region_descriptions.json")
        captions = CaptioningSource(images=str(folder), regions=regions, **files)
        pool = read_captioning(captions, AllUsable())
    seconds = time.perf_counter() - started
    pool.drop_small_classes(images=4)
    started = time.perf_counter()
    episodes = plan_episodes(pool, 3, None, 0)
    return {
        "regions": len(pool.regions),
        "seconds for the pool": seconds,
        "episodes a second": len(episodes) / (time.perf_counter() - started),
    }


class AllUsable:
    """Treats every image as usable, since there are none."""

    def keep(self, items: Iterable[Item], folder: Path, pool: Pool) -> list[Item]:
        return list(items)


# --- Files of the true form ----------------------------------------------------------------------


def write(folder: Path, scale: float) -> None:
    """Write the files of both data sets that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, Iterable[str], str]] = {
        "instances.json": ("", _instances(scale), ""),
        "image_data.json": ("[", _separated(_image_data(scale)), "]"),
        "objects.json": ("[", _separated(_objects(scale)), "]"),
        "region_descriptions.json": ("[", _separated(_regions(scale)), "]"),
    }
    for name, (before, parts, after) in files.items():
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
