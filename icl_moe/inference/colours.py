"""Several classes in one picture: examples whose masks are painted, one colour for each class, and
a query that is painted in the same colours.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.images import (
    ImageLike,
    crop_and_resize_mask,
    load_image,
    load_painted,
    to_square_pixels,
)
from icl_moe.inference.decode import GREEDY, Sampling
from icl_moe.inference.examples import list_pairs
from icl_moe.inference.session import Query, in_own_size
from icl_moe.sequence import Episode
from icl_moe.tasks import SEMANTIC_SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask
from icl_moe.tasks.semantic_segmentation import COLOURS, PaintedPair, find_colours, paint

if TYPE_CHECKING:
    from icl_moe.inference.model import Decoding, InContextModel

_Colour = tuple[int, int, int]


def segment_colours(
    model: "InContextModel",
    examples: Iterable[tuple[ImageLike, ImageLike]],
    query: ImageLike,
    category: str | None = None,
    sampling: Sampling = GREEDY,
    progress: bool = False,
    decoding: "Decoding | None" = None,
) -> np.ndarray:
    """See `InContextModel.segment_colours`."""
    pairs = list_pairs(examples, "painted mask")
    if not pairs:
        raise InputError("Several classes in one mask need an example, which gives their colours.")
    model.check_request(SEMANTIC_SEGMENTATION, len(pairs), category)
    images = [load_image(pair[0], f"The image of example {n}") for n, pair in enumerate(pairs, 1)]
    painted = [
        _load_painted(pair[1], image, f"The mask of example {n}")
        for n, (pair, image) in enumerate(zip(pairs, images, strict=True), 1)
    ]
    names = _names([colours for _, colours in painted])
    drawn = [
        _repainted(painted_HW3, colours, names, model.image_size, f"The mask of example {n}")
        for n, (painted_HW3, colours) in enumerate(painted, 1)
    ]
    query_picture = Query.load(query, model.image_size)
    *image_codes, query_codes = model.encode(
        [*(to_square_pixels(image, model.image_size) for image in images), query_picture.pixels_3HW]
    )
    mask_codes = model.encode_painted(drawn)
    at_once = model.decoding(decoding, sampling) != "autoregressive"
    # An example that lacks a colour says nothing of where it is: it is not asked about it.
    pairs_of: dict[frozenset[_Colour], list[PaintedPair]] = {}
    for image, code, (_, colours) in zip(image_codes, mask_codes, painted, strict=True):
        alike = frozenset(colours if at_once else ())
        pairs_of.setdefault(alike, []).append(PaintedPair(image, code))
    requests = [
        (Episode(SEMANTIC_SEGMENTATION, category or "", tuple(alike)), query_codes)
        for alike in pairs_of.values()
    ]
    found = model.complete(requests, sampling, progress, decoding)
    weights = [len(alike) for alike in pairs_of.values()]
    return _in_their_colours(model, found, weights, names, query_picture)


def _load_painted(
    mask: ImageLike, image: Image.Image, what: str
) -> tuple[np.ndarray, list[_Colour]]:
    """A painted mask, uint8 (H, W, 3), and its colours besides black."""
    name = f"The mask {mask}" if isinstance(mask, str | os.PathLike) else what
    painted_HW3 = load_painted(mask, what)
    height, width = painted_HW3.shape[:2]
    if (width, height) != image.size:
        raise InputError(
            f"{name} is {width} x {height} pixels, but its image is {image.width} x {image.height}."
        )
    colours = [tuple(colour) for colour in np.unique(painted_HW3.reshape(-1, 3), axis=0).tolist()]
    colours = [colour for colour in colours if any(colour)]
    if not colours:
        raise InputError(f"{name} is black: each class must be painted in a colour.")
    if len(colours) > len(COLOURS):
        raise InputError(
            f"{name} has {len(colours)} colours besides black, and may have {len(COLOURS)}: each "
            "class must be painted in one colour, without soft edges, in a file without loss such "
            "as PNG."
        )
    return painted_HW3, colours


def _names(of_masks: list[list[_Colour]]) -> dict[_Colour, str]:
    """The users' colours -> those that the model was trained with, in a fixed order. Raises
    InputError if there are too many.
    """
    colours = sorted({colour for colours in of_masks for colour in colours})
    if len(colours) > len(COLOURS):
        raise InputError(
            f"The masks of the examples have {len(colours)} colours besides black together, and "
            f"may have {len(COLOURS)}: a class must have the same colour in all of them."
        )
    return dict(zip(colours, COLOURS, strict=False))


def _repainted(
    painted_HW3: np.ndarray,
    colours: Sequence[_Colour],
    names: dict[_Colour, str],
    size: int,
    what: str,
) -> np.ndarray:
    """A mask in the model's colours, at its image size, boolean (size, size, 3). Raises InputError
    if nothing of a colour remains.
    """
    whole = (0, 0, painted_HW3.shape[1], painted_HW3.shape[0])
    masks = {}
    for colour in colours:
        mask_HW = crop_and_resize_mask((painted_HW3 == colour).all(axis=-1), whole, size)
        if not mask_HW.any():
            raise InputError(
                f"{what} has so little of the colour {colour} that nothing of it remains at the "
                f"model's {size} x {size} pixels; crop image and mask closer to the objects."
            )
        masks[names[colour]] = mask_HW
    return paint(masks, (size, size)) > 0


def _in_their_colours(
    model: "InContextModel",
    pairs: Sequence[PaintedPair],
    weights: Sequence[int],
    names: dict[_Colour, str],
    query: Query,
) -> np.ndarray:
    """The query's painted picture, uint8 (H, W, 3), in the users' colours and the query's size, of
    what it is after each group of examples that show the same colours.
    """
    width, height = query.size
    written = [pair.drawn for pair in pairs if pair.drawn is not None]
    if not written:
        (pixels_3HW,) = model.decode_painted(pairs[0].painted[None])
        sized = F.interpolate(pixels_3HW[None].clamp(-1, 1), (height, width), mode="bilinear")
        found = find_colours(sized[0])
    else:
        drawn = _weighted(written, weights)
        found = drawn.each(lambda mask: in_own_size(mask, query, model.edges)).disjoint_masks()
    painted_HW3 = np.zeros((height, width, 3), dtype=np.uint8)
    for colour, name in names.items():
        if name in found:
            painted_HW3[found[name]] = colour
    return painted_HW3


def _weighted(drawn: Sequence[DrawnClasses], weights: Sequence[int]) -> DrawnClasses:
    """The weighted mean brightness of each class, over those that have it."""
    masks: dict[str, DrawnMask] = {}
    for name in dict.fromkeys(name for classes in drawn for name in classes.masks):
        of_class = [
            (classes.masks[name], weight)
            for classes, weight in zip(drawn, weights, strict=True)
            if name in classes.masks
        ]
        total = sum(weight for _, weight in of_class)
        mean_HW = np.sum([mask.brightness_HW * (w / total) for mask, w in of_class], axis=0)
        masks[name] = replace(of_class[0][0], brightness_HW=mean_HW)
    return DrawnClasses(masks)
