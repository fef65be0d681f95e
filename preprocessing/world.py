"""A drawn world in which only the examples tell which object is meant: scenes of two to four
objects of thousands of classes, in COCO's file format.

A class is a composition of an outline, a fill colour, a second colour, a pattern and an attached
part. Scale, place, rotation, light, ground, clutter and occlusion vary within a class. Which
classes are held out from training depends only on their names. A scene is a pure function of the
seed, its split and its number, and so are the bytes of the files.
"""

import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from icl_moe.images import PixelBox, box_of_mask
from icl_moe.rle import encode_rle
from icl_moe.seeds import order_of_turn, stable_seed
from preprocessing.recipe import SyntheticScenes
from preprocessing.styles import SeenObject, describe
from preprocessing.synthetic import (
    COLOURS,
    OUTLINES,
    circle,
    polygon,
    window,
    with_article,
    write_json,
)
from preprocessing.workers import ordered_map

HELD_OUT = 240
"""The number of classes that only scenes of the split `val` show, and scenes of `train` never."""

_CHUNK = 64
"""Scenes that one worker draws at a time."""

# --- Classes -------------------------------------------------------------------------------------


class DrawnClass(NamedTuple):
    """A composition. `second` is the colour of the pattern and of the part; None where the class
    has neither.
    """

    outline: str
    colour: str
    second: str | None
    pattern: str
    part: str | None

    @property
    def name(self) -> str:
        """Such as "red star", "red star with blue ears", "red and blue striped star with ears"."""
        is_plain = self.pattern == "plain"
        colours = self.colour if is_plain else f"{self.colour} and {self.second} {self.pattern}"
        if self.part is None:
            return f"{colours} {self.outline}"
        part = f"{self.second} {self.part}" if is_plain else self.part
        part = part if self.part.endswith("s") else with_article(part)
        return f"{colours} {self.outline} with {part}"


class ClassPool:
    """The classes that a split's scenes show, `self[n]`, grouped by outline and colour."""

    def __init__(self, classes: Sequence[DrawnClass]) -> None:
        self.classes = tuple(classes)
        self._alike: dict[tuple[str, str], list[int]] = {}
        for number, drawn in enumerate(self.classes):
            self._alike.setdefault(("outline", drawn.outline), []).append(number)
            self._alike.setdefault(("colour", drawn.colour), []).append(number)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, number: int) -> DrawnClass:
        return self.classes[number]

    def neighbour(self, rng: np.random.Generator, number: int) -> int:
        """Another class that shares the outline or the fill colour, at random; if no class does,
        one that shares neither.
        """
        kind = "outline" if rng.random() < 0.5 else "colour"
        alike = self._alike[kind, getattr(self.classes[number], kind)]
        alike = alike if len(alike) > 1 else list(range(len(self)))
        place = int(rng.integers(len(alike) - 1))
        return alike[place + (place >= bisect_left(alike, number))]


@lru_cache(maxsize=1)
def all_classes() -> tuple[tuple[int, DrawnClass], ...]:
    """All classes with their ids, the held-out ones first, in an order that depends only on their
    names.
    """
    patterned = (
        DrawnClass(outline, colour, second, pattern, part)
        for outline, (colour, second), pattern, part in product(
            _OUTLINES, _colour_pairs(), _PATTERNS, _PARTS
        )
        if (pattern, part) != ("plain", None)
    )
    plain = (
        DrawnClass(outline, colour, None, "plain", None)
        for outline, colour in product(_OUTLINES, _COLOURS)
    )
    numbered = enumerate((*plain, *patterned), start=1)
    return tuple(sorted(numbered, key=lambda item: stable_seed("drawn class", item[1].name)))


def classes_of_split(split: str, count: int) -> list[tuple[int, DrawnClass]]:
    """The classes of a split with their ids: for `train` the first `count` that are not held out,
    for `val` the held-out ones.
    """
    if split == "val":
        return list(all_classes()[:HELD_OUT])
    return list(all_classes()[HELD_OUT : HELD_OUT + count])


_COLOURS = {**COLOURS, "turquoise": (50, 195, 190)}
_LEAST_CONTRAST = 150
"""The least distance between the RGB values of a class's two colours."""


def _colour_pairs() -> list[tuple[str, str]]:
    return [
        (first, second)
        for first, second in product(_COLOURS, _COLOURS)
        if math.dist(_COLOURS[first], _COLOURS[second]) >= _LEAST_CONTRAST
    ]


def _arc(start: float, stop: float, radius: float = 1.0) -> np.ndarray:
    angles = np.linspace(start, stop, 24)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _moved(points: np.ndarray, x: float, y: float) -> np.ndarray:
    return points + np.array([x, y])


_OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    **OUTLINES,
    "oval": (circle(1.0) * (1.1, 0.62),),
    "diamond": (np.array([(0, -1.15), (0.7, 0), (0, 1.15), (-0.7, 0)]),),
    "dome": (_moved(np.array([*_arc(math.pi, 2 * math.pi), (1, 0.15), (-1, 0.15)]), 0, 0.4),),
    "gear": (polygon(lambda a: 1.05 if round(a / (math.pi / 16)) % 4 < 2 else 0.76, 32),),
    "drop": (
        np.concatenate([_moved(_arc(-0.15 * math.pi, 1.15 * math.pi, 0.75), 0, 0.3), [(0, -1.1)]]),
    ),
    "house": (np.array([(0, -1.05), (1, -0.2), (0.75, -0.2), (0.75, 0.9), (-0.75, 0.9),
                        (-0.75, -0.2), (-1, -0.2)]),),
    "bar": (np.array([(-1.2, -0.42), (1.2, -0.42), (1.2, 0.42), (-1.2, 0.42)]),),
    "fan": (np.concatenate([_arc(0.2 * math.pi, 1.8 * math.pi), [(0.0, 0.0)]]),),
}  # fmt: skip

_HALF_BLUR = 0.12
"""Half the width of the soft edge between a pattern's two colours, in object radii."""


def _soft(values: np.ndarray) -> np.ndarray:
    return np.clip(values / (2 * _HALF_BLUR) + 0.5, 0, 1)


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    dx, dy = (x + 0.4) % 0.8 - 0.4, (y + 0.4) % 0.8 - 0.4
    return _soft(0.27 - np.hypot(dx, dy))


def _wave(values: np.ndarray, period: float) -> np.ndarray:
    """Alternating 1 and 0 for half a period each; 1 around 0."""
    return _soft(np.cos(2 * math.pi * values / period) * period / (2 * math.pi))


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, down = _wave(x + 0.25, 1.0), _wave(y + 0.25, 1.0)
    return across * (1 - down) + down * (1 - across)


_Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
_PATTERNS: dict[str, _Pattern] = {
    "plain": lambda x, y: np.zeros_like(x),
    "striped": lambda x, y: _wave(x, 0.7),
    "banded": lambda x, y: _wave(y, 0.7),
    "dotted": _dots,
    "ringed": lambda x, y: _wave(np.hypot(x, y), 0.7),
    "chequered": _checks,
    "halved": lambda x, y: _soft(x),
    "framed": lambda x, y: _soft(np.maximum(abs(x), abs(y)) - 0.55),
}
"""Pattern -> the share of the second colour at points of the object, given in radii from its
centre.
"""

_LEFT_EAR = np.array([(-0.15, -0.5), (-0.7, -0.2), (-0.85, -1.4)])
_LEFT_LEG = np.array([(-0.6, 0.4), (-0.25, 0.4), (-0.25, 1.45), (-0.6, 1.45)])
_LEFT_WING = np.array([(-0.4, -0.25), (-0.4, 0.4), (-1.7, -0.55)])
_FLIP = (-1, 1)
_PARTS: dict[str | None, tuple[np.ndarray, ...]] = {
    None: (),
    "ears": (_LEFT_EAR, _LEFT_EAR * _FLIP),
    "legs": (_LEFT_LEG, _LEFT_LEG * _FLIP),
    "wings": (_LEFT_WING, _LEFT_WING * _FLIP),
    "wheels": (_moved(circle(0.38, 20), -0.6, 0.95), _moved(circle(0.38, 20), 0.6, 0.95)),
    "tail": (
        np.array([(0.3, 0.1), (1.4, -0.35), (1.4, -0.1), (0.3, 0.5)]),
        _moved(circle(0.3, 20), 1.5, -0.25),
    ),
    "hat": (
        np.array([(-0.8, -0.6), (0.8, -0.6), (0.8, -0.85), (-0.8, -0.85)]),
        np.array([(-0.42, -0.8), (0.42, -0.8), (0.42, -1.45), (-0.42, -1.45)]),
    ),
    "stand": (
        np.array([(-0.16, 0.3), (0.16, 0.3), (0.16, 1.3), (-0.16, 1.3)]),
        np.array([(-0.75, 1.15), (0.75, 1.15), (0.75, 1.45), (-0.75, 1.45)]),
    ),
}
"""Part -> polygons in object radii, which lie behind the outline."""

# --- Scenes --------------------------------------------------------------------------------------

_GROUNDS = {
    "grey": (122, 122, 122),
    "dark": (56, 56, 62),
    "pale": (205, 203, 197),
    "green": (104, 128, 98),
    "blue": (98, 116, 146),
    "brown": (138, 114, 94),
}
_RADII = (0.115, 0.23)
"""The least and largest radius of an object, in sides of the scene."""

_LEAST_VISIBLE = 0.5
"""The share of each object that must stay visible inside the frame and beside other objects."""

_OVERSAMPLING = 4


@dataclass(frozen=True)
class DrawnObject:
    """The visible part of an object: its class as a number of the pool, the mask (H, W, boolean) of
    its visible pixels, and their box.
    """

    number: int
    mask_HW: np.ndarray
    box: PixelBox


@dataclass(frozen=True)
class ClassScene:
    """A drawn RGB image, its objects (farthest first), all of different classes, and the name of
    the ground behind them.
    """

    image: Image.Image
    objects: tuple[DrawnObject, ...]
    ground: str


def draw_class_scene(
    pool: ClassPool, side: int, seed: int, split: str, index: int, hard_neighbours: float
) -> ClassScene:
    """Scene number `index`, `side` pixels square.

    The scenes with numbers n len(pool) to (n + 1) len(pool) - 1 show each class of the pool at
    least once. In a share `hard_neighbours` of the scenes, a second object has the same outline or
    fill colour.
    """
    turn, place = divmod(index, len(pool))
    rng = np.random.default_rng([seed, zlib.crc32(f"classes {split}".encode()), index])
    numbers = [int(order_of_turn(len(pool), seed, turn)[place])]
    wanted = int(rng.integers(2, 5))
    if rng.random() < hard_neighbours:
        numbers.append(pool.neighbour(rng, numbers[0]))
    while len(set(numbers)) < wanted:
        numbers.append(int(rng.integers(len(pool))))
    numbers = list(dict.fromkeys(numbers))
    rng.shuffle(numbers)

    layers = _arrange(rng, [pool[number] for number in numbers], side)
    ground = str(rng.choice(tuple(_GROUNDS)))
    canvas_HW3 = _draw_ground(rng, ground, side)
    for drawn, layer in zip((pool[number] for number in numbers), layers, strict=True):
        layer.paint(rng, canvas_HW3, drawn)
    canvas_HW3 *= _draw_light(rng, side)
    noise_HW3 = rng.standard_normal(canvas_HW3.shape, dtype=np.float32)
    canvas_HW3 += np.float32(rng.uniform(1.0, 5.0)) * noise_HW3
    image = Image.fromarray(canvas_HW3.clip(0, 255).round().astype(np.uint8))
    objects = (
        DrawnObject(number, mask_HW, box_of_mask(mask_HW))
        for number, mask_HW in zip(numbers, _visible(layers, side), strict=True)
    )
    return ClassScene(image, tuple(objects), ground)


@dataclass(frozen=True)
class _Layer:
    """An object at its place. body_hw, part_hw: the shares of each pixel of a patch that its
    outline and its part cover. corner: the patch's left and top in the scene; the patch may extend
    beyond it. x_hw, y_hw: the coordinates of the patch's pixels, in radii from the object's centre.
    """

    corner: tuple[int, int]
    body_hw: np.ndarray
    part_hw: np.ndarray
    x_hw: np.ndarray
    y_hw: np.ndarray

    @cached_property
    def alpha_hw(self) -> np.ndarray:
        return np.maximum(self.body_hw, self.part_hw)

    def mask_HW(self, side: int) -> np.ndarray:
        mask_HW = np.zeros((side, side), dtype=bool)
        scene, patch = window(self.corner, self.body_hw.shape, side)
        mask_HW[scene] = self.alpha_hw[patch] >= 0.5
        return mask_HW

    def paint(self, rng: np.random.Generator, canvas_HW3: np.ndarray, drawn: DrawnClass) -> None:
        """Draw the object over the scene, in colours a little different from those of its class."""
        colours = [
            (np.array(_COLOURS[name]) + rng.uniform(-12, 12, 3)).astype(np.float32)
            for name in (drawn.colour, drawn.second or drawn.colour)
        ]
        scene, patch = window(self.corner, self.body_hw.shape, canvas_HW3.shape[0])
        amount_hw1 = _PATTERNS[drawn.pattern](self.x_hw[patch], self.y_hw[patch])[..., None]
        alpha_hw1, body_hw1 = self.alpha_hw[patch][..., None], self.body_hw[patch][..., None]
        surface_hw3 = colours[0] + amount_hw1 * (colours[1] - colours[0])
        paint_hw3 = colours[1] + body_hw1 * (surface_hw3 - colours[1])
        canvas_HW3[scene] += alpha_hw1 * (paint_hw3 - canvas_HW3[scene])


def _arrange(rng: np.random.Generator, classes: list[DrawnClass], side: int) -> list[_Layer]:
    """Place an object of each class so that all are visible; in about a third of the scenes they
    may partly cover one another.
    """
    closest = 0.3 if rng.random() < 0.35 else 1.05
    for attempt in range(100):
        # After several failed attempts, the objects are made smaller and may not overlap.
        shrink, closest = 0.97**attempt, closest if attempt < 10 else 1.05
        circles = _place(rng, len(classes), closest, shrink)
        if circles is None:
            continue
        layers = [
            _draw_object(rng, drawn, np.array(place) * side)
            for drawn, place in zip(classes, circles, strict=True)
        ]
        whole = [(layer.alpha_hw >= 0.5).sum() for layer in layers]
        seen = [mask_HW.sum() for mask_HW in _visible(layers, side)]
        if all(s >= max(1, _LEAST_VISIBLE * w) for s, w in zip(seen, whole, strict=True)):
            return layers
    raise AssertionError("small objects that do not touch always fit")


def _place(
    rng: np.random.Generator, count: int, closest: float, shrink: float
) -> list[tuple[float, float, float]] | None:
    """Centres and radii in sides of the scene. Two centres are apart by at least the larger radius
    plus `closest` times the smaller. None if no place was found.
    """
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(12):
            radius = shrink * rng.uniform(*_RADII)
            x, y = rng.uniform(0.6 * radius, 1 - 0.6 * radius, 2)
            if all(
                math.hypot(x - a, y - b) >= max(radius, r) + closest * min(radius, r)
                for a, b, r in placed
            ):
                placed.append((x, y, radius))
                break
        else:
            return None
    return placed


def _draw_object(rng: np.random.Generator, drawn: DrawnClass, place: np.ndarray) -> _Layer:
    """An object of a class, rotated, stretched and perhaps mirrored; x, y and radius in pixels."""
    centre, radius = place[:2], place[2]
    angle, stretch = rng.uniform(-0.4, 0.4), math.exp(rng.uniform(-0.12, 0.12))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    to_pixels = np.diag([stretch * rng.choice((-1, 1)), 1 / stretch]) @ turn * radius
    outline = [points @ to_pixels + centre for points in _OUTLINES[drawn.outline]]
    parts = [points @ to_pixels + centre for points in _PARTS[drawn.part]]
    points = np.concatenate([*outline, *parts])
    low, high = np.floor(points.min(axis=0)).astype(int), np.ceil(points.max(axis=0)).astype(int)
    columns_w = np.arange(low[0], high[0], dtype=np.float32) + np.float32(0.5 - centre[0])
    rows_h1 = (np.arange(low[1], high[1], dtype=np.float32) + np.float32(0.5 - centre[1]))[:, None]
    inverse = np.linalg.inv(to_pixels).astype(np.float32)
    return _Layer(
        corner=(int(low[0]), int(low[1])),
        body_hw=_coverage(outline[:1], outline[1:], low, high),
        part_hw=_coverage(parts, [], low, high),
        x_hw=columns_w * inverse[0, 0] + rows_h1 * inverse[1, 0],
        y_hw=columns_w * inverse[0, 1] + rows_h1 * inverse[1, 1],
    )


def _coverage(
    polygons: list[np.ndarray], holes: list[np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The share of each pixel of the patch from `low` to `high` (x, y) that the polygons cover,
    without their holes.
    """
    size = high - low
    if not polygons:
        return np.zeros(size[::-1], dtype=np.float32)
    drawing = Image.new("L", tuple(size * _OVERSAMPLING))
    pen = ImageDraw.Draw(drawing)
    for points, level in (*((p, 255) for p in polygons), *((p, 0) for p in holes)):
        pen.polygon(((points - low) * _OVERSAMPLING).ravel().tolist(), fill=level)
    return np.asarray(drawing.reduce(_OVERSAMPLING), dtype=np.float32) / 255.0


def _visible(layers: list[_Layer], side: int) -> list[np.ndarray]:
    """The mask of each layer's part that later layers leave visible."""
    masks: list[np.ndarray] = []
    covered_HW = np.zeros((side, side), dtype=bool)
    for layer in reversed(layers):
        mask_HW = layer.mask_HW(side)
        masks.insert(0, mask_HW & ~covered_HW)
        covered_HW |= mask_HW
    return masks


def _draw_ground(rng: np.random.Generator, ground: str, side: int) -> np.ndarray:
    """Ground of a muted colour that varies over the scene, with clutter on it: float canvas
    (side, side, 3).
    """
    base = np.array(_GROUNDS[ground]) + rng.uniform(-14, 14, 3)
    cells = int(rng.integers(2, 7))
    tiles = base + rng.normal(0, rng.uniform(2, 14), (cells, cells, 1))
    tiles = tiles + rng.uniform(-7, 7, (cells, cells, 3))
    picture = Image.fromarray(tiles.clip(0, 255).astype(np.uint8))
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 9))):
        shade = tuple(int(value) for value in (base + rng.uniform(-60, 60, 3)).clip(0, 255))
        x, y = rng.uniform(0, side, 2)
        if rng.random() < 0.5:
            dx, dy = rng.uniform(-0.3, 0.3, 2) * side
            pen.line([x, y, x + dx, y + dy], fill=shade, width=max(1, side // 64))
        else:
            dx, dy = rng.uniform(0.01, 0.05, 2) * side
            pen.ellipse([x - dx, y - dy, x + dx, y + dy], fill=shade)
    return np.asarray(picture, dtype=np.float32).copy()


def _draw_light(rng: np.random.Generator, side: int) -> np.ndarray:
    """The light as a factor of each pixel's three colours, (side, side, 3): brighter or darker,
    falling off to one side, a little warm or cold.
    """
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.25)
    steps = np.linspace(-1, 1, side, dtype=np.float32)
    fall_HW = slope * (math.cos(angle) * steps + math.sin(angle) * steps[:, None])
    warmth = rng.uniform(-0.06, 0.06)
    tint = rng.uniform(0.8, 1.1) * np.array([1 + warmth, 1, 1 - warmth])
    return ((1 + fall_HW)[..., None] * tint).astype(np.float32)


# --- Files ---------------------------------------------------------------------------------------


def write_dataset(folder: Path, scenes: SyntheticScenes, side: int, workers: int) -> None:
    """Draw the scenes of a recipe's section `synthetic` into `folder`.

    images/<image_id>.png     squares of `side` pixels
    instances_<split>.json    COCO 2017 instances; all masks are RLE
    captions_<split>.json     captions of each instance, as instance_captions.py reads them
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    numbered = classes_of_split(scenes.split, scenes.classes)
    pool = ClassPool([drawn for _, drawn in numbered])
    ids = [number for number, _ in numbered]
    chunks = [
        range(start, min(start + _CHUNK, scenes.images))
        for start in range(0, scenes.images, _CHUNK)
    ]
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    work = (folder / "images", scenes, pool, side)
    with tqdm(total=scenes.images, desc=f"drawing {scenes.split}", unit="image") as progress:
        for chunk, drawn in zip(
            chunks, ordered_map(_draw_images, work, chunks, workers), strict=True
        ):
            for annotation, texts in drawn:
                category, number = ids[annotation.pop("class")], len(annotations) + 1
                annotations.append({**annotation, "category_id": category, "id": number})
                about = {"image_id": annotation["image_id"], "instance_id": number}
                for text in texts:
                    captions.append({**about, **text, "id": len(captions) + 1})
            progress.update(len(chunk))
    images = [
        {"id": number, "file_name": f"{number}.png", "width": side, "height": side}
        for number in range(1, scenes.images + 1)
    ]
    categories = [
        {"id": number, "name": drawn.name, "supercategory": drawn.outline}
        for number, drawn in numbered
    ]
    info = {"description": "Drawn scenes of composed classes, in COCO's format"}
    head = {"info": info, "images": images}
    write_json(
        folder / f"instances_{scenes.split}.json",
        {**head, "annotations": annotations, "categories": categories},
    )
    write_json(folder / f"captions_{scenes.split}.json", {**head, "annotations": captions})


_Drawn = tuple[dict[str, Any], list[dict[str, Any]]]


def _draw_images(
    work: tuple[Path, SyntheticScenes, ClassPool, int], numbers: range
) -> list[_Drawn]:
    """Draw some scenes. Returns the annotation of each object, in which `class` is the class's
    number in the pool, and its captions.
    """
    folder, scenes, pool, side = work
    drawn = []
    for index in numbers:
        scene = draw_class_scene(
            pool, side, scenes.seed, scenes.split, index, scenes.hard_neighbours
        )
        scene.image.save(folder / f"{index + 1}.png", compress_level=1)
        texts = _captions(pool, scene, side, scenes, index)
        drawn += [
            (_annotation(seen, index + 1), texts[place]) for place, seen in enumerate(scene.objects)
        ]
    return drawn


def _captions(
    pool: ClassPool, scene: ClassScene, side: int, scenes: SyntheticScenes, index: int
) -> list[list[dict[str, Any]]]:
    """The captions of each object of a scene in each style."""
    rng = np.random.default_rng(
        [scenes.seed, zlib.crc32(f"captions {scenes.split}".encode()), index]
    )
    seen = []
    for drawn in scene.objects:
        of_class = pool[drawn.number]
        colours = tuple(filter(None, (of_class.colour, of_class.second)))
        seen.append(SeenObject(of_class.name, of_class.outline, colours, drawn.box))
    texts: list[list[dict[str, Any]]] = [[] for _ in seen]
    for place, style, text in describe(rng, seen, scene.ground, side):
        texts[place].append({"style": style, "caption": text})
    return texts


def _annotation(drawn: DrawnObject, image_id: int) -> dict[str, Any]:
    left, top, right, bottom = drawn.box
    return {
        "segmentation": encode_rle(drawn.mask_HW),
        "area": float(drawn.mask_HW.sum()),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [left, top, right - left, bottom - top],
        "class": drawn.number,
    }
