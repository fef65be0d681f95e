"""Small data sets in the true formats of published benchmarks: a few images with their masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.classes import COCO_CLASSES

WIDTH, HEIGHT = 240, 200

VOC_NAMES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC_CLASSES = tuple(VOC_NAMES.split())


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(path)


def polygon(x: int, y: int, w: int, h: int) -> list[list[int]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_coco(folder: Path, part: str = "val2014") -> Path:
    """Thirty images. Image 3 g + 1 to 3 g + 3 show the classes 8 g to 8 g + 7, each in a rectangle
    of 50 x 50 pixels; in image 1, the last annotation, a bicycle, covers half of the person, beside
    whom is a crowd of persons.
    """
    prefix = "COCO_val2014_" if part == "val2014" else ""
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 2 * n + 1, "name": name} for n, name in enumerate(COCO_CLASSES)],
    }

    def annotate(image: int, number: int, x: int, y: int, w: int, h: int, crowd: int = 0) -> None:
        content["annotations"].append(
            {
                "id": 100 + len(content["annotations"]),
                "image_id": image,
                "category_id": 2 * number + 1,
                "segmentation": polygon(x, y, w, h),
                "area": w * h,
                "bbox": [x, y, w, h],
                "iscrowd": crowd,
            }
        )

    for image in range(1, 31):
        name = f"{prefix}{image:012d}.jpg"
        save_image(folder / part / name, image)
        content["images"].append({"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT})
        first = 8 * ((image - 1) // 3)
        for place in range(8):
            annotate(image, first + place, 60 * (place % 4), 100 * (place // 4), 50, 50)
    annotate(1, 0, 0, 60, 240, 30, crowd=1)
    annotate(1, 1, 0, 0, 25, 50)
    file = folder / f"annotations/instances_{part}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return folder


def write_coco_lists(folder: Path) -> dict[int, dict[int, list[str]]]:
    """HSNet's lists of images for `write_coco`, rewritten as JSON: fold -> class -> names."""
    lists: dict[int, dict[int, list[str]]] = {}
    for fold in range(4):
        lists[fold] = {}
        for number in range(fold, 80, 4):
            images = [3 * (number // 8) + n for n in (3, 1, 2)]
            lists[fold][number] = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in images]
        file = folder / f"splits/coco/val/fold{fold}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(lists[fold]))
    return lists


def write_voc(folder: Path) -> dict[int, list[tuple[str, int]]]:
    """Forty images of VOC 2012, each with two classes (palette PNGs, with edges of the level 255).
    Returns HSNet's lists: fold -> (image, class's number).
    """
    (folder / "SegmentationClassAug").mkdir(parents=True)
    lists: dict[int, list[tuple[str, int]]] = {fold: [] for fold in range(4)}
    for image in range(40):
        name, levels = f"2007_{image:06d}", np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        save_image(folder / f"JPEGImages/{name}.jpg", image)
        for place in range(2):
            number = (image // 2 + place) % 20
            levels[40:120, 80 * place + 10 : 80 * place + 70] = 255
            levels[44:116, 80 * place + 14 : 80 * place + 66] = number + 1
            lists[number // 5].append((name, number))
        mask = Image.fromarray(levels, mode="P")
        mask.putpalette([value for n in range(256) for value in (n, 255 - n, n)])
        mask.save(folder / f"SegmentationClassAug/{name}.png")
    for fold, listed in lists.items():
        file = folder / f"splits/pascal/val/fold{fold}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}__{number + 1:02d}\n" for name, number in listed))
    return lists


def write_fss(folder: Path, classes: tuple[str, ...] = ("ab_wheel", "zucchini")) -> Path:
    """FSS-1000's layout: ten images of each class, with white masks of three channels."""
    for row, name in enumerate(classes):
        for number in range(1, 11):
            save_image(folder / f"{name}/{number}.jpg", 100 * row + number)
            mask = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            mask[20:120, 10 * number : 10 * number + 80] = 255
            Image.fromarray(mask).save(folder / f"{name}/{number}.png")
    file = folder / "splits/fss/test.txt"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{name}\n" for name in reversed(classes)))
    return folder


def write_lvis(folder: Path) -> Path:
    """LVIS v1: twelve classes, of which two are COCO's; each image shows the classes n and n + 1.
    Its images have an address instead of a file's name.
    """
    names = ["dog", "television_set", *(f"alarm_clock_({n})" for n in range(10))]
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    for number, name in enumerate(names, start=1):
        synonyms = [name, "tv"] if name.startswith("television") else [name]
        content["categories"].append({"id": number, "name": name, "synonyms": synonyms})
    for image in range(1, 37):
        part = "train2017" if image % 2 else "val2017"
        save_image(folder / f"{part}/{image:012d}.jpg", image)
        address = f"http://images.cocodataset.org/{part}/{image:012d}.jpg"
        content["images"].append(
            {"id": image, "coco_url": address, "width": WIDTH, "height": HEIGHT}
        )
        for place in range(2):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image,
                    "category_id": (image + place) % 12 + 1,
                    "segmentation": polygon(100 * place, 10, 60, 60),
                    "area": 3600,
                    "bbox": [100 * place, 10, 60, 60],
                }
            )
    file = folder / "annotations/lvis_v1_val.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return folder
