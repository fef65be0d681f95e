"""Object scale: which part of an image a pair shows."""

from icl_moe.images import PixelBox
from preprocessing.recipe import ObjectScale

PixelRect = tuple[float, float, float, float]
"""x, y, width, height in pixels."""

MARGIN = 1.5
"""Side of a `large` crop / longer side of the object in it."""


def square_crop(
    scale: ObjectScale,
    objects: PixelRect,
    largest: PixelRect,
    width: int,
    height: int,
    image_size: int,
) -> PixelBox:
    """The square of a width x height image that a segmentation pair shows.

    any: the largest square, as near to the middle of `objects` (the box of all instances) as the
    image allows, so that it contains as much of them as possible.
    large: a square around `largest` (the box of the largest instance), 1.5 times its longer side,
    so that the object fills much of it. Its side is at least half of image_size, so that pixels are
    at most doubled, and at most the image's shorter side.
    """
    whole = min(width, height)
    if scale == "any":
        return _place(objects, whole, width, height)
    side = min(max(round(MARGIN * max(largest[2:])), image_size // 2), whole)
    return _place(largest, side, width, height)


def _place(rect: PixelRect, side: int, width: int, height: int) -> PixelBox:
    """A square of `side` centred on `rect`, moved into the image."""
    x, y, w, h = rect
    left = min(max(round(x + w / 2 - side / 2), 0), width - side)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side)
    return left, top, left + side, top + side
