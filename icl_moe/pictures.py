"""Pictures for display: masks and boxes drawn over images, cells with text, and grids of cells."""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from icl_moe.boxes import Box

BOX_COLOUR = (255, 70, 70)
COLOURS = (
    (255, 70, 70),
    (40, 150, 255),
    (255, 200, 0),
    (0, 200, 120),
    (210, 90, 255),
    (255, 130, 30),
    (0, 210, 220),
    (255, 120, 190),
)
"""The colours of the masks of different classes over one image."""

_LEAST_SIDE = 256
_CELL, _TEXT_HEIGHT, _LINE_LENGTH, _LINES = 192, 48, 32, 3


@dataclass(frozen=True)
class Cell:
    """A picture with a heading above it and a text below it."""

    heading: str
    picture: Image.Image
    text: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of cells, one row for each episode, each under its own title."""

    title: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def masked(image: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    """The image in its colours inside the mask, and dark and grey elsewhere."""
    grey = np.asarray(image.convert("L").convert("RGB")) * 0.35
    return Image.fromarray(np.where(mask_HW[..., None], np.asarray(image), grey).astype(np.uint8))


def overlaid(image: Image.Image, mask_HW: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """The image, tinted inside a mask and with a line of that colour along its edge. The mask may
    have another size; it is resized to that of the image.
    """
    mask = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(image.size)
    inside_HW = np.asarray(mask) >= 128
    edge_HW = inside_HW & (np.asarray(mask.filter(ImageFilter.MinFilter(3))) < 128)
    strength_HW1 = np.where(edge_HW, 1.0, np.where(inside_HW, 0.4, 0.0))[..., None]
    levels = np.asarray(image) * (1 - strength_HW1) + np.array(colour) * strength_HW1
    return Image.fromarray(levels.astype(np.uint8))


def boxed(image: Image.Image, box: Box | None) -> Image.Image:
    """The image with a thin frame at a normalised box, enlarged so that the frame shows. Its white
    edge shows on every ground, to colour-blind readers too.
    """
    factor = -(-_LEAST_SIDE // image.width)
    enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if box is not None:
        corners = [value * (side - 1) for value, side in zip(box, enlarged.size * 2, strict=True)]
        draw = ImageDraw.Draw(enlarged)
        around = [value + (-1, -1, 1, 1)[n] for n, value in enumerate(corners)]
        draw.rectangle(around, outline="white", width=5)
        draw.rectangle(corners, outline=BOX_COLOUR, width=3)
    return enlarged


def draw_grid(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Rows of cells as one picture, each cell with its heading and text below it."""
    columns = max(len(cells) for cells in rows)
    grid = Image.new("RGB", (columns * _CELL, len(rows) * (_CELL + _TEXT_HEIGHT)), "white")
    draw = ImageDraw.Draw(grid)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            left, top = column * _CELL, row * (_CELL + _TEXT_HEIGHT)
            grid.paste(cell.picture.resize((_CELL, _CELL), Image.Resampling.NEAREST), (left, top))
            lines = textwrap.wrap(f"{cell.heading}: {cell.text}".rstrip(": "), _LINE_LENGTH)
            text = "\n".join(lines[:_LINES])
            draw.multiline_text((left + 2, top + _CELL), text, fill="black")
    return grid


def data_url(picture: Image.Image) -> str:
    """A picture as a PNG data URL, for the source of an <img>."""
    return _url(picture, "PNG", optimize=True)


def jpeg_url(picture: Image.Image) -> str:
    """A photograph as a JPEG data URL, a tenth of the size of a PNG."""
    return _url(picture, "JPEG", quality=80)


_DRAWN = 256
"""Pictures up to this width are shown pixel by pixel; larger ones are photographs."""


def picture_url(picture: Image.Image) -> str:
    """A data URL of a small picture as it is, and of a photograph as JPEG."""
    return data_url(picture) if picture.width < _DRAWN else jpeg_url(picture)


def _url(picture: Image.Image, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{format.lower()};base64,{content}"
