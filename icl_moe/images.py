"""Loading, cropping and resizing images; rendering and thresholding masks. Both stages use it, so
both see the same pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from icl_moe.errors import InputError
from icl_moe.tokenizers.boxes import Box

PixelBox = tuple[int, int, int, int]
"""left, top, right, bottom in whole pixels, right and bottom exclusive."""


def load_image(path: str | Path) -> Image.Image:
    """The image at `path` as 8-bit RGB, turned upright by its EXIF tag.

    Greyscale, palette, 16-bit, CMYK and images with transparency (over black) are converted. Raises
    InputError for a file that is missing, unreadable, truncated, animated, or larger than Pillow's
    limit against decompression bombs.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"The image {path} does not exist.")
    try:
        with Image.open(path) as image:
            # Cameras' MPO files hold a second view, yet are stills: Pillow opens the first.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise InputError(f"The image {path} is animated; a still image belongs there.")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise InputError(
            f"The image {path} is too large: {Image.MAX_IMAGE_PIXELS} pixels are allowed."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The image {path} cannot be read; it is damaged or no image ({error})."
        ) from error


def middle_square(size: tuple[int, int]) -> PixelBox:
    """The largest square in the middle of a picture of `size` (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def crop_and_resize(image: Image.Image, box: PixelBox, size: int) -> Image.Image:
    """`box` of an RGB image, resized to size x size: bicubic, antialiased."""
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def crop_and_resize_mask(mask_HW: np.ndarray, box: PixelBox, size: int) -> np.ndarray:
    """`box` of a boolean mask, resized to (size, size): a pixel is set where at least half of its
    area was.
    """
    left, top, right, bottom = box
    crop = Image.fromarray(mask_HW[top:bottom, left:right].astype(np.uint8) * 255)
    return np.asarray(crop.resize((size, size), Image.Resampling.BOX)) >= 128


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as pixels_3HW, float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def to_image(pixels_3HW: torch.Tensor) -> Image.Image:
    """The inverse of `to_pixels`; values outside [-1, 1] are clipped."""
    levels = ((pixels_3HW.detach().float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def mask_to_pixels(mask_HW: np.ndarray) -> torch.Tensor:
    """A boolean mask as the picture that the tokenizer sees: white on black, pixels_3HW in
    [-1, 1].
    """
    plane = torch.from_numpy(np.asarray(mask_HW, dtype=np.float32)) * 2.0 - 1.0
    return plane.expand(3, *plane.shape).clone()


def pixels_to_mask(pixels_3HW: torch.Tensor) -> np.ndarray:
    """The boolean mask (H, W) of a drawn mask: brighter than mid-grey on average over the
    channels.
    """
    return (pixels_3HW.float().mean(dim=-3) > 0.0).cpu().numpy()


def box_to_mask(box: Box, size: int) -> np.ndarray:
    """True inside a normalised box, on a square of `size` pixels: at least one of them."""
    left, top, right, bottom = (round(value * size) for value in box)
    mask = np.zeros((size, size), dtype=bool)
    mask[min(top, size - 1) : max(bottom, top + 1), min(left, size - 1) : max(right, left + 1)] = (
        True
    )
    return mask


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow clips 16-bit values when converting; scale them instead.
        values = np.asarray(image, dtype=np.float64)
        is_16_bit = image.mode.startswith("I;16") or values.max(initial=0) > 255
        levels = np.clip(values / 257.0 if is_16_bit else values, 0, 255)
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert(
            "RGB"
        )
    return image.convert("RGB")
