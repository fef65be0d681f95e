"""Examples from a user: pairs of an image and a mask or a region, read into pairs of codes."""

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from icl_moe.boxes import Box
from icl_moe.errors import InputError
from icl_moe.images import (
    ImageLike,
    box_to_mask,
    crop_and_resize_mask,
    load_image,
    load_mask,
    to_square_pixels,
)
from icl_moe.inference.region import Region
from icl_moe.tasks import CAPTIONING, SEGMENTATION, Task
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair

if TYPE_CHECKING:
    from icl_moe.inference.model import InContextModel

T = TypeVar("T")

_TOGETHER = 16
"""How many examples are in memory as pictures at a time; the rest are codes."""


def list_pairs(examples: Any, second: str = "mask or region") -> list[tuple[Any, Any]]:
    """The examples, from any iterable, as a list of pairs. Raises InputError for anything else."""
    pairs = list(examples) if isinstance(examples, Iterable) else [examples]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(
                f"Example {number} must be a pair (image, {second}) in a list of examples, not "
                f"{type(pair).__name__}."
            )
    return [(image, output) for image, output in pairs]


def task_of(pairs: Sequence[tuple[Any, Any]]) -> Task | None:
    """Captioning if the first example has a region, or a file of one; None without examples."""
    if not pairs:
        return None
    output = pairs[0][1]
    is_file = isinstance(output, str | os.PathLike)
    has_region = str(output).lower().endswith(".json") if is_file else isinstance(output, Region)
    return CAPTIONING if has_region else SEGMENTATION


def category_of(pairs: Sequence[tuple[Any, Any]]) -> str | None:
    """The category that all regions share which name one; None if there are several or none."""
    regions = (_open_region(region, number)[0] for number, (_, region) in enumerate(pairs, 1))
    named = {region.category for region in regions if region.category}
    return named.pop() if len(named) == 1 else None


def read_pairs(
    model: "InContextModel",
    task: Task,
    pairs: Sequence[tuple[Any, Any]],
    category: str | None,
    of_class: str = "",
    progress: bool = False,
) -> tuple[Any, ...]:
    """The examples as the task's pairs of codes, in order, with a few pictures in memory at a time.

    category: of regions that name none. of_class: the class's name, for messages. Raises InputError
    for an example that cannot be read or does not fit the model.
    """
    read = _segmentation_pairs if task is SEGMENTATION else _caption_pairs
    bar = tqdm(pairs, "reading examples", disable=not progress, delay=2, leave=False)
    numbered = enumerate(bar, 1)
    return tuple(
        pair
        for some in in_batches(numbered, _TOGETHER)
        for pair in read(model, [_Example(of_class, n, *each) for n, each in some], category)
    )


class _Example:
    """An example with its picture; `name` is as in "The mask of example 2"."""

    def __init__(self, of_class: str, number: int, image: ImageLike, output: Any) -> None:
        self.name = f"example {number}{of_class and f' of {of_class}'}"
        self.number, self.output = number, output
        self.picture = load_image(image, f"The image of {self.name}")


def _codes(model: "InContextModel", examples: Sequence[_Example]) -> list[np.ndarray]:
    return model.encode(
        [to_square_pixels(example.picture, model.image_size) for example in examples]
    )


def _segmentation_pairs(
    model: "InContextModel", examples: Sequence[_Example], _: str | None
) -> Iterator[SegmentationPair]:
    masks = [_mask_of(example, model.image_size) for example in examples]
    codes = zip(_codes(model, examples), model.encode_masks(masks), strict=True)
    return (SegmentationPair(image, mask) for image, mask in codes)


def _mask_of(example: _Example, size: int) -> np.ndarray:
    mask, what = example.output, f"The mask of {example.name}"
    mask_HW = load_mask(mask, example.picture.size, what)
    return squared_mask(mask_HW, size, str(mask) if isinstance(mask, str | os.PathLike) else what)


def squared_mask(mask_HW: np.ndarray, size: int, name: str) -> np.ndarray:
    """An example's mask at the model's image size, boolean (size, size). name: of the mask, for
    messages. Raises InputError if nothing of it remains.
    """
    square_HW = crop_and_resize_mask(mask_HW, (0, 0, *mask_HW.shape[::-1]), size)
    if not square_HW.any():
        raise InputError(
            f"{name} is so small that nothing of it remains at the model's {size} x {size} pixels; "
            "crop image and mask closer to the object."
        )
    return square_HW


def _caption_pairs(
    model: "InContextModel", examples: Sequence[_Example], category: str | None
) -> Iterator[CaptionPair]:
    regions = [_open_region(example.output, example.number) for example in examples]
    boxes = [
        None if region.box is None else region.box_in(example.picture.size, name)
        for example, (region, name) in zip(examples, regions, strict=True)
    ]
    return (
        _caption_pair(model, name, codes, region, box, category)
        for codes, (region, name), box in zip(_codes(model, examples), regions, boxes, strict=True)
    )


def _caption_pair(
    model: "InContextModel",
    name: str,
    codes: np.ndarray,
    region: Region,
    box: Box | None,
    category: str | None,
) -> CaptionPair:
    category = region.category or category
    if category is None and model.format.category != "none":
        raise InputError(f"{name} lacks the category that this model's captions name.")
    if model.format.box == "none":
        return CaptionPair(codes, region.caption, category)
    if box is None:
        raise InputError(f"{name} lacks the box that this model's captions place.")
    if model.format.box == "text":
        return CaptionPair(codes, region.caption, category, box)
    # As in the paper: 0 on the object, 1 elsewhere.
    (drawn,) = model.encode_masks([~box_to_mask(box, model.image_size)])
    return CaptionPair(codes, region.caption, category, box, box_image=drawn)


def _open_region(region: Any, number: int) -> tuple[Region, str]:
    """An example's region, and its name in messages."""
    if isinstance(region, str | os.PathLike):
        return Region.load(region), str(region)
    name = f"Example {number}"
    if not isinstance(region, Region):
        raise InputError(
            f"{name} must have a Region, or the path of its file, not {type(region).__name__}."
        )
    region.check(name)
    return region, name


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items as lists of `size`, the last of which may be shorter; taken only when needed."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def is_one_image(queries: Any) -> bool:
    """Whether these are one image, or at least no collection of images, though one may iterate over
    it.
    """
    one = (str, bytes, os.PathLike, Image.Image, np.ndarray, torch.Tensor, Mapping, io.IOBase)
    return isinstance(queries, one) or not isinstance(queries, Iterable)
