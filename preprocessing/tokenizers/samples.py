"""Training samples of an image tokenizer: crops of pictures and masks, drawn or from a folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.images import (
    IMAGE_SUFFIXES,
    PixelBox,
    crop_and_resize,
    crop_and_resize_mask,
    load_image,
    mask_to_pixels,
    to_pixels,
)
from preprocessing.coco import class_masks, load_instances
from preprocessing.synthetic import draw_picture
from preprocessing.tokenizers.recipe import SYNTHETIC, TokenizerData, TokenizerRecipe

Source = Callable[[Sequence[int], range], tuple[Tensor, Tensor]]
"""(key, wanted) -> pixels_B3HW in [-1, 1], is_mask_B: the samples with the numbers `wanted` in the
infinite sequence of samples that `key` seeds.
"""

UNSEEN = 2**31  # a step number that no training reaches; its samples are for the log

_CROPS = 4
"""Samples made from one picture, so that drawing or decoding pictures does not slow the training
down.
"""


def open_source(recipe: TokenizerRecipe) -> Source:
    draw = (
        (lambda rng, _: draw_picture(rng))
        if recipe.data.images == SYNTHETIC
        else _folder_source(recipe.data)
    )
    size, smallest = recipe.network.image_size, recipe.data.smallest_crop

    def crops(key: Sequence[int], number: int) -> list[tuple[Tensor, bool]]:
        rng = np.random.default_rng([*key, number])
        is_mask = (rng.random(_CROPS) < recipe.data.mask_share).tolist()
        image, masks = draw(rng, any(is_mask))
        made = []
        for masked in is_mask:
            box = _random_crop(rng, image.size, smallest)
            if masked:
                made.append(
                    mask_to_pixels(crop_and_resize_mask(masks[rng.integers(len(masks))], box, size))
                )
            else:
                made.append(to_pixels(crop_and_resize(image, box, size)))
        return list(zip(made, is_mask, strict=True))

    def samples(key: Sequence[int], wanted: range) -> tuple[Tensor, Tensor]:
        first = wanted.start // _CROPS
        made = [
            crop
            for number in range(first, -(-wanted.stop // _CROPS))
            for crop in crops(key, number)
        ]
        pixels, is_mask = zip(*made[wanted.start - first * _CROPS :][: len(wanted)], strict=True)
        return torch.stack(pixels), torch.tensor(is_mask)

    return samples


def _folder_source(
    data: TokenizerData,
) -> Callable[[np.random.Generator, bool], tuple[Image.Image, list[np.ndarray]]]:
    """Draws a random picture of the folder; for masks, one that has annotations, with its class
    masks.
    """
    folder = Path(data.images)
    files = image_files(folder)
    truth = ClassMasks(Path(data.annotations)) if data.annotations else None
    with_masks = [file for file in files if truth and truth.has(file.name)]
    if data.mask_share and not with_masks:
        raise InputError(f"{data.annotations} has no annotation of any picture in {folder}.")

    def draw(rng: np.random.Generator, masked: bool) -> tuple[Image.Image, list[np.ndarray]]:
        chosen = with_masks if masked else files
        file = chosen[rng.integers(len(chosen))]
        image = load_image(file)
        return image, list(truth.of(file.name, image.size).values()) if truth and masked else []

    return draw


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, in the order of their names. Raises InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it must be one of images.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{folder} holds no images, such as .jpg or .png files.")
    return files


class ClassMasks:
    """The class masks of a COCO instances file by the pictures' file names."""

    def __init__(self, path: Path) -> None:
        self._coco = load_instances(path)
        names = {number: image.get("file_name") for number, image in self._coco.imgs.items()}
        self._ids = {name: number for number, name in names.items() if isinstance(name, str)}

    def has(self, file_name: str) -> bool:
        return bool(self._coco.imgToAnns.get(self._ids.get(file_name)))

    def of(self, file_name: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
        """Category id -> mask_HW of all instances, for the picture of `size` (width, height).
        Raises InputError if the record has another size.
        """
        if file_name not in self._ids:
            return {}
        masks = class_masks(self._coco, self._ids[file_name])
        for mask_HW in masks.values():
            if mask_HW.shape != size[::-1]:
                raise InputError(
                    f"{file_name} is {size[0]} x {size[1]} pixels, but its record in "
                    f"{self._coco.file} says {mask_HW.shape[1]} x {mask_HW.shape[0]}."
                )
        return masks


def _random_crop(rng: np.random.Generator, size: tuple[int, int], smallest: float) -> PixelBox:
    width, height = size
    side = max(1, round(min(size) * rng.uniform(smallest, 1.0)))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side
