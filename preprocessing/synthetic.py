"""A drawn data set in COCO's and Visual Genome's file formats, for the demo, the tests and the
demo's tokenizer.

A scene holds one to four textured objects of twelve classes on a plain background. Everything,
including the bytes of the files, is a pure function of the seed, and every phrase is true of its
picture.
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import PixelBox, box_of_mask
from icl_moe.rle import count_runs

DEFAULT_SIZE = (160, 128)


@dataclass(frozen=True)
class SceneObject:
    """The visible part of one object, which `mask_HW` (boolean) and `box` cover.

    outlines: the drawn polygons, float pixel coordinates (points, 2); None if they differ from the
    visible part (because it is partly covered or has a hole). crowd: a group of small objects under
    one mask, without phrases.
    """

    name: str
    colour: str
    texture: str
    size: str
    mask_HW: np.ndarray
    box: PixelBox
    outlines: tuple[np.ndarray, ...] | None
    crowd: bool
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A drawn RGB image, its objects (farthest first) and captions of the whole image."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]

    def class_mask(self, name: str) -> np.ndarray:
        """The union of the masks of all objects of a class, (H, W) boolean."""
        return np.logical_or.reduce([o.mask_HW for o in self.objects if o.name == name])


def draw_scene(rng: np.random.Generator, image_size: int | tuple[int, int] = DEFAULT_SIZE) -> Scene:
    """Draw one scene of `image_size` (a side, or width and height, in pixels; 32 or more)."""
    width, height = _as_size(image_size)
    canvas_HW3 = _draw_background(rng, width, height)
    layers: list[_Layer] = []
    crowd_at = int(rng.integers(0, 8))  # in about one of five scenes, one object is a crowd
    for number in range(int(rng.integers(1, 5))):
        for _ in range(20):
            layer = _draw_layer(rng, width, height, crowd=number == crowd_at)
            if layer is not None and _leaves_all_visible(layer, layers):
                canvas_HW3 += layer.alpha_HW[..., None] * (layer.paint_HW3 - canvas_HW3)
                layers.append(layer)
                break
    canvas_HW3 += rng.normal(0.0, 2.0, canvas_HW3.shape)
    objects = _describe(rng, layers, width, height)
    captions = tuple(_caption(rng, objects) for _ in range(2))
    return Scene(
        Image.fromarray(canvas_HW3.clip(0, 255).round().astype(np.uint8)), objects, captions
    )


def draw_picture(rng: np.random.Generator) -> tuple[Image.Image, list[np.ndarray]]:
    """A scene's image and the masks of its classes, for training an image tokenizer."""
    scene = draw_scene(rng)
    return scene.image, [scene.class_mask(name) for name in sorted({o.name for o in scene.objects})]


def write_dataset(
    folder: Path,
    images: int,
    seed: int,
    split: str = "train",
    image_size: int | tuple[int, int] = DEFAULT_SIZE,
) -> None:
    """Draw `images` scenes into `folder`; each split needs its own folder. Equal arguments give
    byte-equal files.

    images/<image_id>.jpg             one folder serves both formats
    instances_<split>.json            COCO 2017 instances: polygons, uncompressed RLE, crowds
    captions_<split>.json             COCO 2017 captions, two an image
    region_descriptions.json, objects.json, image_data.json     Visual Genome 1.4

    Raises InputError if the number of images is below 1 or a side of the images below 32.
    """
    if images < 1:
        raise InputError(f"A synthetic data set needs at least 1 image, not {images}.")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    width, height = _as_size(image_size)
    writer = _Writer(width, height)
    for image_id in tqdm(range(1, images + 1), desc=f"drawing {split}", unit="image", disable=None):
        scene = draw_scene(
            np.random.default_rng([seed, zlib.crc32(split.encode()), image_id]), (width, height)
        )
        scene.image.save(folder / "images" / f"{image_id}.jpg", quality=92)
        writer.add(image_id, scene)
    for name, content in writer.files(split).items():
        write_json(folder / name, content)


def _as_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    width, height = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(width, height) < 32:
        raise InputError(
            f"Synthetic images need sides of at least 32 pixels, not {width} x {height}."
        )
    return width, height


# --- Classes: outlines of radius about 1 around the origin, y downwards; a second polygon is a
# hole. ---


def polygon(
    radii: Callable[[float], float], points: int, start: float = -math.pi / 2
) -> np.ndarray:
    angles = start + np.arange(points) * 2 * math.pi / points
    lengths = np.array([radii(angle - start) for angle in angles])
    return np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)


def circle(radius: float, points: int = 40) -> np.ndarray:
    return polygon(lambda _: radius, points)


def _crescent() -> np.ndarray:
    outer = np.linspace(0.3 * math.pi, 1.7 * math.pi, 30)
    tip = np.array([math.cos(outer[0]), math.sin(outer[0])])
    centre, radius = 0.45, math.hypot(tip[0] - 0.45, tip[1])
    start = math.atan2(tip[1], tip[0] - centre)
    inner = np.linspace(-start, -2 * math.pi + start, 30)
    arc = np.stack([centre + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    crescent = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), arc])
    return crescent + np.array([0.2, 0.0])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


_CROSS = (
    np.array(
        [
            (-1, -3),
            (1, -3),
            (1, -1),
            (3, -1),
            (3, 1),
            (1, 1),
            (1, 3),
            (-1, 3),
            (-1, 1),
            (-3, 1),
            (-3, -1),
            (-1, -1),
        ]
    )
    / 3
)
_ARROW = np.array(
    [(-1, -0.32), (0.1, -0.32), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.32), (-1, 0.32)]
)
_BOLT = np.array([(0.35, -1), (-0.65, 0.15), (-0.05, 0.15), (-0.35, 1), (0.65, -0.2), (0.05, -0.2)])


@dataclass(frozen=True)
class _ShapeClass:
    name: str
    supercategory: str
    category_id: int
    outlines: tuple[np.ndarray, ...]
    colours: tuple[str, ...]  # the typical ones; three in ten objects have any other


# The category ids have gaps, as in COCO.
_CLASSES = (
    _ShapeClass("disc", "round", 1, (circle(1.0),), ("orange", "white", "blue")),
    _ShapeClass("ring", "round", 2, (circle(1.0), circle(0.5)), ("yellow", "pink", "black")),
    _ShapeClass("crescent", "round", 3, (_crescent(),), ("yellow", "white", "purple")),
    _ShapeClass(
        "square",
        "angular",
        5,
        (circle(1.25, 4) @ np.array([[1, 1], [-1, 1]]) / math.sqrt(2),),
        ("blue", "green", "black"),
    ),
    _ShapeClass("triangle", "angular", 6, (circle(1.1, 3),), ("green", "red", "purple")),
    _ShapeClass("hexagon", "angular", 7, (circle(1.0, 6),), ("brown", "green", "orange")),
    _ShapeClass("cross", "symbol", 8, (_CROSS,), ("red", "white", "black")),
    _ShapeClass(
        "star",
        "symbol",
        9,
        (polygon(lambda a: 1.1 if round(a / (math.pi / 5)) % 2 == 0 else 0.48, 10),),
        ("yellow", "red", "blue"),
    ),
    _ShapeClass("heart", "symbol", 11, (_heart(),), ("red", "pink", "purple")),
    _ShapeClass("arrow", "symbol", 12, (_ARROW,), ("black", "blue", "orange")),
    _ShapeClass("bolt", "symbol", 13, (_BOLT,), ("yellow", "orange", "white")),
    _ShapeClass(
        "flower",
        "plant",
        15,
        (polygon(lambda a: 0.72 + 0.3 * math.cos(5 * a), 60),),
        ("pink", "white", "purple"),
    ),
)
CLASS_NAMES = tuple(shape.name for shape in _CLASSES)
OUTLINES = {shape.name: shape.outlines for shape in _CLASSES}

COLOURS = {
    "red": (205, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "purple": (120, 45, 150),
    "pink": (245, 140, 185),
    "brown": (110, 65, 30),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
# Radius / the image's short side.
_SIZES = {
    "small": (0.10, 0.14),
    "medium": (0.17, 0.24),
    "large": (0.28, 0.36),
}
_TEXTURES = ("plain", "striped", "dotted")
_TEXTURE_CHANCES = (0.6, 0.25, 0.15)


@dataclass(frozen=True)
class _Layer:
    """One drawn object before others cover it."""

    shape: _ShapeClass
    colour: str
    texture: str
    size: str
    outlines: tuple[np.ndarray, ...]
    alpha_HW: np.ndarray
    paint_HW3: np.ndarray
    crowd: bool

    @property
    def mask_HW(self) -> np.ndarray:
        return self.alpha_HW >= 0.5


def _draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Four muted corner colours, blended, with soft clouds or faint stripes over them: float canvas
    (H, W, 3) in 0..255.
    """
    corners = rng.uniform(90, 170) + rng.uniform(-22, 22, (2, 2, 3))
    canvas_HW3 = _resize(corners, width, height, Image.Resampling.BILINEAR)
    if rng.random() < 0.7:
        clouds = rng.normal(0, rng.uniform(2, 9), (max(2, height // 16), max(2, width // 16), 1))
        return canvas_HW3 + _resize(clouds, width, height, Image.Resampling.BICUBIC)
    return (
        canvas_HW3
        + rng.uniform(4, 10) * np.sign(_waves(rng, width, height, rng.uniform(10, 24)))[..., None]
    )


def _draw_layer(rng: np.random.Generator, width: int, height: int, crowd: bool) -> _Layer | None:
    """An object (or, as a crowd, three to six small ones of a class) at a random place; None if no
    place was found.
    """
    shape = _CLASSES[rng.integers(len(_CLASSES))]
    colour = str(rng.choice(shape.colours if rng.random() < 0.7 else tuple(COLOURS)))
    texture = "plain" if crowd else str(rng.choice(_TEXTURES, p=_TEXTURE_CHANCES))
    size = "small" if crowd else str(rng.choice(tuple(_SIZES)))
    side = min(width, height)
    coverage, outlines = np.zeros((height, width)), []
    centre = rng.uniform(0.15, 0.85, 2) * (width, height)
    for _ in range(int(rng.integers(3, 7)) if crowd else 1):
        radius = side * (rng.uniform(0.06, 0.08) if crowd else rng.uniform(*_SIZES[size]))
        place = centre + (rng.uniform(-0.2, 0.2, 2) * side if crowd else 0)
        placed = _place(rng, shape.outlines, radius, place)
        points = np.concatenate(placed)
        if points.min() < 1 or (points.max(axis=0) > (width - 1, height - 1)).any():
            return None
        coverage = np.maximum(coverage, _rasterise(placed, width, height))
        outlines += placed
    base = np.clip(np.array(COLOURS[colour]) + rng.uniform(-14, 14, 3), 0, 255)
    paint_HW3 = _paint(rng, base, texture, width, height, max(radius * 0.55, 5.0))
    return _Layer(shape, colour, texture, size, tuple(outlines), coverage, paint_HW3, crowd)


def _place(
    rng: np.random.Generator, outlines: tuple[np.ndarray, ...], radius: float, centre: np.ndarray
) -> list[np.ndarray]:
    """The outlines, rotated and stretched a little, scaled to `radius` pixels and moved to
    `centre`.
    """
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    stretch = np.exp(rng.uniform(-0.1, 0.1))
    return [(points * (stretch, 1 / stretch)) @ turn * radius + centre for points in outlines]


def _rasterise(
    outlines: list[np.ndarray], width: int, height: int, oversampling: int = 4
) -> np.ndarray:
    """The share of each pixel (H, W) that lies in the first outline and not in the second."""
    low = np.floor(outlines[0].min(axis=0)).astype(int)
    high = np.ceil(outlines[0].max(axis=0)).astype(int)
    drawing = Image.new("L", tuple((high - low) * oversampling))
    pen = ImageDraw.Draw(drawing)
    for points, level in zip(outlines, (255, 0), strict=False):
        pen.polygon([tuple(point) for point in (points - low) * oversampling], fill=level)
    coverage = np.zeros((height, width))
    coverage[low[1] : high[1], low[0] : high[0]] = np.asarray(drawing.reduce(oversampling)) / 255.0
    return coverage


def _paint(
    rng: np.random.Generator, base: np.ndarray, texture: str, width: int, height: int, period: float
) -> np.ndarray:
    """The object's surface over the whole canvas, (H, W, 3): its colour, shaded, with the texture
    in a second shade.
    """
    shade = np.linspace(rng.uniform(0.9, 1.0), rng.uniform(1.0, 1.1), width)
    surface = np.broadcast_to(base * shade[:, None], (height, width, 3))
    if texture == "plain":
        return surface
    second = base * 0.45 if base.mean() > 100 else base + 0.55 * (255 - base)
    if texture == "striped":
        amount = _waves(rng, width, height, period) * 1.5
    else:
        rows, columns = np.mgrid[0:height, 0:width]
        amount = (
            np.cos(2 * math.pi * rows / period) * np.cos(2 * math.pi * columns / period) * 4 - 1.0
        )
    blend = np.clip(amount + 0.5, 0, 1)[..., None]
    return surface * (1 - blend) + second * blend


def _waves(rng: np.random.Generator, width: int, height: int, period: float) -> np.ndarray:
    """Parallel waves (H, W) in -1..1 of a random direction; `period` in pixels."""
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:height, 0:width]
    return np.sin(
        2 * math.pi / period * (columns * math.cos(angle) + rows * math.sin(angle)) + phase
    )


def _resize(values_hwC: np.ndarray, width: int, height: int, how: Image.Resampling) -> np.ndarray:
    planes = [
        Image.fromarray(plane.astype(np.float32)).resize((width, height), how)
        for plane in np.moveaxis(values_hwC, -1, 0)
    ]
    return np.stack([np.asarray(plane, dtype=np.float64) for plane in planes], axis=-1)


def _leaves_all_visible(new: _Layer, layers: list[_Layer]) -> bool:
    """Whether at least half of every object below stays visible once `new` lies on top."""
    covered = new.mask_HW
    for layer in reversed(layers):
        mask = layer.mask_HW
        if (mask & ~covered).sum() < 0.5 * mask.sum():
            return False
        covered = covered | mask
    return True


# --- Words ---


def _describe(
    rng: np.random.Generator, layers: list[_Layer], width: int, height: int
) -> tuple[SceneObject, ...]:
    masks: list[np.ndarray] = []
    covered = np.zeros((height, width), dtype=bool)
    for layer in reversed(layers):
        masks.insert(0, layer.mask_HW & ~covered)
        covered |= layer.mask_HW
    boxes = [box_of_mask(mask) for mask in masks]
    objects = []
    for i, layer in enumerate(layers):
        seen_whole = masks[i].sum() == layer.mask_HW.sum() and len(layer.shape.outlines) == 1
        objects.append(
            SceneObject(
                name=layer.shape.name,
                colour=layer.colour,
                texture=layer.texture,
                size=layer.size,
                mask_HW=masks[i],
                box=boxes[i],
                outlines=layer.outlines if seen_whole else None,
                crowd=layer.crowd,
                phrases=() if layer.crowd else _phrases(rng, i, layers, boxes, width, height),
            )
        )
    return tuple(objects)


def _phrases(
    rng: np.random.Generator,
    i: int,
    layers: list[_Layer],
    boxes: list[PixelBox],
    width: int,
    height: int,
) -> tuple[str, ...]:
    """Two phrases: the object with its place in the picture, and relative to a neighbour (or with
    its attributes alone).
    """
    name = _noun_phrase(rng, layers[i])
    others = [j for j in range(len(layers)) if j != i and not layers[j].crowd]
    relations = [(relation, j) for j in others if (relation := relation_of(boxes[i], boxes[j]))]
    placed = f"the {name} {place_in_picture(boxes[i], width, height)}"
    if not relations:
        return placed, with_article(_noun_phrase(rng, layers[i]))
    relation, j = relations[rng.integers(len(relations))]
    return (
        placed,
        f"{with_article(_noun_phrase(rng, layers[i]))} {relation} "
        f"{with_article(f'{layers[j].colour} {layers[j].shape.name}')}",
    )


def _noun_phrase(rng: np.random.Generator, layer: _Layer) -> str:
    size = "" if layer.size == "medium" or rng.random() < 0.3 else layer.size
    texture = "" if layer.texture == "plain" else layer.texture
    return " ".join(word for word in (size, texture, layer.colour, layer.shape.name) if word)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def thirds(box: PixelBox, width: int, height: int) -> tuple[str, str]:
    """In which thirds of a picture the middle of a box lies: "top", "bottom" or "", and "left",
    "right" or "".
    """
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    down = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return down, across


def place_in_picture(box: PixelBox, width: int, height: int) -> str:
    down, across = thirds(box, width, height)
    if across and down:
        return f"in the {down} {across} corner"
    if down:
        return f"near the {down}"
    return f"on the {across}" if across else "in the middle"


def relation_of(a: PixelBox, b: PixelBox) -> str | None:
    """The direction of `a` relative to `b`, if it is clear: their centres differ along it by more
    than half of either box; otherwise None.
    """
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) > 1.5 * abs(dy) and abs(dx) > max(a[2] - a[0], b[2] - b[0]) / 2:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx) and abs(dy) > max(a[3] - a[1], b[3] - b[1]) / 2:
        return "above" if dy < 0 else "below"
    return None


def _caption(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> str:
    parts = []
    for o in objects:
        texture = "" if o.texture == "plain" or rng.random() < 0.5 else o.texture + " "
        parts.append(
            f"a group of {o.colour} {o.name} shapes"
            if o.crowd
            else with_article(f"{texture}{o.colour} {o.name}")
        )
    parts = [parts[i] for i in rng.permutation(len(parts))]
    return (
        " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts).capitalize()
        + "."
    )


Slices = tuple[slice, slice]
"""Rows, then columns."""


def window(corner: tuple[int, int], shape: tuple[int, ...], side: int) -> tuple[Slices, Slices]:
    """The part of a square scene that a patch of `shape` (rows, columns) covers with its left and
    top at `corner`, and the corresponding part of the patch.
    """
    scene, patch = [], []
    for start, length in zip(corner[::-1], shape, strict=True):
        low, high = min(max(start, 0), side), max(min(start + length, side), 0)
        scene.append(slice(low, max(low, high)))
        patch.append(slice(low - start, max(low, high) - start))
    return (scene[0], scene[1]), (patch[0], patch[1])


# --- Files ---


class _Writer:
    """Collects the records of both formats, image by image."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._captions: list[dict[str, Any]] = []
        self._regions: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []
        self._region_count = 0

    def add(self, image_id: int, scene: Scene) -> None:
        name, size = f"{image_id}.jpg", {"height": self._height, "width": self._width}
        self._images.append(
            {
                "license": 1,
                "file_name": name,
                **size,
                "date_captured": "2020-01-01 00:00:00",
                "id": image_id,
            }
        )
        for text in scene.captions:
            self._captions.append(
                {"image_id": image_id, "id": len(self._captions) + 1, "caption": text}
            )
        regions, objects = [], []
        for o in scene.objects:
            self._annotations.append(self._coco_annotation(image_id, o))
            if o.crowd:
                continue
            left, top, right, bottom = o.box
            place = {"w": right - left, "h": bottom - top, "x": left, "y": top}
            object_id = self._annotations[-1]["id"]
            objects.append(
                {
                    "synsets": [f"{o.name}.n.01"],
                    "object_id": object_id,
                    "merged_object_ids": [],
                    "names": [o.name],
                    **place,
                }
            )
            for phrase in o.phrases:
                self._region_count += 1
                region = {
                    "region_id": self._region_count,
                    "image_id": image_id,
                    "phrase": phrase,
                    "x": left,
                    "y": top,
                }
                regions.append({**region, "width": place["w"], "height": place["h"]})
        self._regions.append({"regions": regions, "id": image_id})
        self._objects.append({"image_id": image_id, "objects": objects, "image_url": name})

    def files(self, split: str) -> dict[str, Any]:
        """File name -> content."""
        info = {
            "description": "Synthetic scenes in COCO's format",
            "version": "1.0",
            "year": 2020,
            "contributor": "",
            "url": "",
        }
        licenses = [
            {
                "url": "https://creativecommons.org/publicdomain/zero/1.0/",
                "id": 1,
                "name": "CC0 1.0",
            }
        ]
        head = {"info": info, "licenses": licenses, "images": self._images}
        categories = [
            {"supercategory": c.supercategory, "id": c.category_id, "name": c.name}
            for c in _CLASSES
        ]
        size = {"width": self._width, "height": self._height}
        image_data = [
            {
                **size,
                "url": i["file_name"],
                "image_id": i["id"],
                "coco_id": i["id"],
                "flickr_id": None,
            }
            for i in self._images
        ]
        return {
            f"instances_{split}.json": {
                **head,
                "annotations": self._annotations,
                "categories": categories,
            },
            f"captions_{split}.json": {**head, "annotations": self._captions},
            "region_descriptions.json": self._regions,
            "objects.json": self._objects,
            "image_data.json": image_data,
        }

    def _coco_annotation(self, image_id: int, o: SceneObject) -> dict[str, Any]:
        """Polygons if the drawn outline is completely visible, otherwise RLE; a crowd is always
        RLE, as in COCO.
        """
        left, top, right, bottom = o.box
        if o.outlines is None or o.crowd:
            segmentation: Any = {
                "counts": count_runs(o.mask_HW).tolist(),
                "size": [self._height, self._width],
            }
        else:
            segmentation = [
                [round(float(value), 2) for value in points.ravel()] for points in o.outlines
            ]
        return {
            "segmentation": segmentation,
            "area": float(o.mask_HW.sum()),
            "iscrowd": int(o.crowd),
            "image_id": image_id,
            "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
            "category_id": next(c.category_id for c in _CLASSES if c.name == o.name),
            "id": len(self._annotations) + 1,
        }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as compact JSON, which appears as a whole."""
    write_whole(path, json.dumps(content, separators=(",", ":")))
