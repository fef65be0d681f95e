"""Loading, cropping and resizing images; rendering and thresholding masks. Offline and online stage
share this module, so both see the same pixels.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from icl_moe.boxes import Box
from icl_moe.errors import InputError
from icl_moe.inputs import other_kind_of

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""A file, a Pillow image, or an array."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".avif", ".heic", ".heif", ".jp2", ".pbm", ".pgm", ".ppm", ".tga"),
)
"""The endings of images and masks in a folder, in lower case; other files are left out. HEIC cannot
be read, but whoever has such photographs is told so.
"""

MASK_SUFFIXES = ("_mask", "-mask", "_masks", "_seg", "_segmentation", "_label", "_labels", "_gt")
"""What the name of a mask may add to that of its image."""

PixelBox = tuple[int, int, int, int]
"""left, top, right, bottom in whole pixels, right and bottom exclusive."""


def load_image(image: ImageLike, what: str = "The image") -> Image.Image:
    """The image from any source as 8-bit RGB, rotated upright by its EXIF tag; the same pixels for
    every source.

    Greyscale, palette, 16-bit, float, CMYK and images with transparency (over black) are converted.
    An array is (H, W) or (H, W, 1 to 4 channels), uint8, uint16 or boolean. what: the name in
    messages of an image that is not a file. Raises InputError if the image is missing, unreadable,
    truncated, animated, empty, or larger than Pillow's limit against decompression bombs.
    """
    name = f"The image {image}" if isinstance(image, str | os.PathLike) else what
    with _reading(image, name):
        return _to_rgb(_open(image, name), name)


def load_recorded(path: str | os.PathLike[str], size: tuple[int, int]) -> Image.Image:
    """The image of a file as annotations of a picture of `size` (width, height) assume it: as in
    `load_image`; or as it is stored, if an EXIF tag turns it but the record has the size of the
    stored picture. It may have another size, too. Raises InputError as `load_image` does.
    """
    image = load_image(path)
    if image.size != size and image.size == size[::-1]:
        with Image.open(path) as stored:
            undo = UNTURNED.get(stored.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if undo is None else image.transpose(undo)
    return image


UNTURNED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> the transposition that undoes it, for orientations that exchange width and
height (JEITA CP-3451, tag 0x0112).
"""


def load_painted(mask: ImageLike, what: str = "The mask") -> np.ndarray:
    """A mask of several classes as uint8 (H, W, 3), read as in `load_image`, but levels of one
    channel are ids and are not scaled. Raises InputError also for levels beyond 255.
    """
    name = f"The mask {mask}" if isinstance(mask, str | os.PathLike) else what
    with _reading(mask, name):
        levels_HWC, _ = _levels(mask, name)
    if levels_HWC.dtype == bool:
        levels_HWC = levels_HWC * np.uint8(255)
    small_HWC = levels_HWC.astype(np.uint8)
    differs_HWC = small_HWC != levels_HWC
    if differs_HWC.any():
        raise InputError(
            f"{name} has the level {levels_HWC[differs_HWC][0]:g}; each class must have a colour, "
            "or a whole number of 1..255 as its level."
        )
    return np.broadcast_to(small_HWC, (*small_HWC.shape[:2], 3))


class EmptyMaskError(InputError):
    """A mask marks nothing."""


class SeveralLevelsError(InputError):
    """A mask has more than two levels."""


def load_mask(mask: ImageLike, size: tuple[int, int] | None, what: str = "The mask") -> np.ndarray:
    """The boolean mask (H, W) of an image of `size` (width, height), or of any size if that is
    None: true at the brighter of its two levels, or everywhere if it has only one level above 0.

    It is read as in `load_image`, but levels of one channel are not scaled, and an array of one
    channel may hold numbers of any type. In a picture of an object that was cut out, the mask is
    what is not transparent. Soft edges and compression artefacts are rounded. Raises InputError
    also if the mask has another size, marks nothing (EmptyMaskError), or has more than
    two levels, such as the ids of several objects (SeveralLevelsError).
    """
    name = f"The mask {mask}" if isinstance(mask, str | os.PathLike) else what
    with _reading(mask, name):
        levels_HWC, format = _levels(mask, name)
    height, width = levels_HWC.shape[:2]
    if size is not None and (width, height) != size:
        hint = "; if EXIF data turn the image, the mask must be turned too"
        raise InputError(
            f"{name} is {width} x {height} pixels, but its image is {size[0]} x {size[1]}"
            f"{hint if (height, width) == size else ''}."
        )
    brightness_HW = _brightness(levels_HWC)
    least, most = float(brightness_HW.min()), float(brightness_HW.max())
    if least < 0:
        raise InputError(f"{name} has the level {least:g}; levels must be at least 0.")
    if most == 0:
        raise EmptyMaskError(
            f"{name} marks nothing: all of it is black or transparent; the object must be brighter "
            "than the rest."
        )
    if least == most:
        return np.ones((height, width), dtype=bool)
    mask_HW = brightness_HW > (least + most) / 2
    # Compression overshoots at edges, so the threshold is halfway between the median levels of the
    # two sides.
    mask_HW = (
        brightness_HW > (np.median(brightness_HW[~mask_HW]) + np.median(brightness_HW[mask_HW])) / 2
    )
    found = _third_levels(levels_HWC, mask_HW, format) or _many_levels(levels_HWC, mask_HW)
    if found:
        raise SeveralLevelsError(
            f"{name} does not have two levels: {found}; a mask must mark one object, such as white "
            "on black."
        )
    return mask_HW


def load_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """What a label image stores: int64 class ids (H, W), which are the indices of a palette image
    or the levels of a grey one; or colours, uint8 (H, W, 3).

    A colour image whose three channels are equal stores ids too. Raises InputError as `load_image`
    does, and for levels that are no whole numbers.
    """
    name = f"The mask {path}"
    with _reading(path, name):
        image = _open(path, name)
        if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
            colours_HW3 = np.asarray(_to_rgb(image, name))
            is_grey = (colours_HW3 == colours_HW3[..., :1]).all()
            return colours_HW3[..., 0].astype(np.int64) if is_grey else colours_HW3
        levels_HW = np.asarray(image)
        levels_HW = levels_HW[..., 0] if levels_HW.ndim == 3 else levels_HW  # with transparency
        if levels_HW.dtype.kind == "f" and not (levels_HW == levels_HW.round()).all():
            raise InputError(f"{name} has levels that are not whole numbers, so they are no ids.")
        return levels_HW.astype(np.int64)


def load_colours(path: str | os.PathLike[str]) -> np.ndarray:
    """The colours of a label image, uint8 (H, W, 3), those of a palette too. Raises InputError as
    `load_image` does.
    """
    return np.asarray(load_image(path, "The mask"))


def colour_codes(colours: np.ndarray) -> np.ndarray:
    """Colours of 8 bits (..., 3) as one whole number each, int32 (...): 0xRRGGBB."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)


def colours_of(codes: np.ndarray) -> np.ndarray:
    """The inverse of `colour_codes`."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)


def middle_square(size: tuple[int, int]) -> PixelBox:
    """The largest square in the middle of a picture of `size` (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def box_of_mask(mask_HW: np.ndarray) -> PixelBox:
    """The box around the pixels of a boolean mask, of which there is at least one."""
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop_and_resize(image: Image.Image, box: PixelBox, size: int) -> Image.Image:
    """`box` of an RGB image, resized to size x size: bicubic, antialiased."""
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def crop_and_resize_mask(mask_HW: np.ndarray, box: PixelBox, size: int) -> np.ndarray:
    """`box` of a boolean mask, resized to (size, size): a pixel is set if at least half of its area
    was.
    """
    left, top, right, bottom = box
    crop = Image.fromarray(mask_HW[top:bottom, left:right].astype(np.uint8) * 255)
    return np.asarray(crop.resize((size, size), Image.Resampling.BOX)) >= 128


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as pixels_3HW, float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def to_square_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """The whole image, stretched to a square, as pixels_3HW of size x size in [-1, 1]."""
    return to_pixels(crop_and_resize(image, (0, 0, image.width, image.height), size))


def to_image(pixels_3HW: torch.Tensor) -> Image.Image:
    """The inverse of `to_pixels`; values outside [-1, 1] are clipped."""
    levels = ((pixels_3HW.detach().float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def mask_to_pixels(mask_HW: np.ndarray) -> torch.Tensor:
    """A boolean mask as a picture for the tokenizer: white on black, pixels_3HW in [-1, 1]."""
    plane = torch.from_numpy(np.asarray(mask_HW, dtype=np.float32)) * 2.0 - 1.0
    return plane.expand(3, *plane.shape).clone()


def pixels_to_mask(pixels_3HW: torch.Tensor) -> np.ndarray:
    """The boolean mask (H, W) of a drawn mask: brighter than mid-grey on average over the
    channels.
    """
    return (pixels_to_brightness(pixels_3HW) > 0.0).cpu().numpy()


def pixels_to_brightness(pixels_3HW: torch.Tensor) -> torch.Tensor:
    """The brightness of each pixel, brightness_HW: the mean over the channels, about -1 to 1."""
    return pixels_3HW.float().mean(dim=-3)


def box_to_mask(box: Box, size: int) -> np.ndarray:
    """True inside a normalised box, on a square of `size` pixels; at least one pixel."""
    left, top, right, bottom = (round(value * size) for value in box)
    mask = np.zeros((size, size), dtype=bool)
    mask[min(top, size - 1) : max(bottom, top + 1), min(left, size - 1) : max(right, left + 1)] = (
        True
    )
    return mask


# --- Reading ---


@contextlib.contextmanager
def _reading(image: ImageLike, name: str) -> Iterator[None]:
    """Turn exceptions of Pillow into an InputError; its readers raise many kinds for damaged
    files.
    """
    try:
        with warnings.catch_warnings():
            # It warns above half of its limit, without naming the image.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} is too large: {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels are allowed."
        ) from error
    except MemoryError as error:
        raise InputError(f"{name} is too large for this machine's memory.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{name} cannot be read ({error.strerror}).") from error
        if isinstance(image, str | os.PathLike) and (kind := other_kind_of(Path(image))):
            raise InputError(f"{name} is {kind}.") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{name} cannot be read; it is damaged or not an image ({reason})."
        ) from error


def _open(image: ImageLike, name: str) -> Image.Image:
    """The image with its pixels in memory, upright, in its original mode."""
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Image.Image):
        return _upright(image, name)
    if not isinstance(image, str | os.PathLike):
        raise InputError(
            f"{name} must be a path, a Pillow image or a NumPy array, not {type(image).__name__}."
        )
    path = Path(image)
    if not path.is_file():
        raise InputError(f"{name} {'is not a file' if path.exists() else 'does not exist'}.")
    with Image.open(path) as opened:
        return _upright(opened, name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    if image.format == "EPS":
        # Pillow would start Ghostscript with it, whatever the name of the file is.
        raise InputError(f"{name} is PostScript, which is not taken: use a JPEG or PNG file.")
    # The MPO files of cameras hold a second view but are still images; Pillow opens the first view.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InputError(f"{name} is animated or has several pages; it must be a still image.")
    if 0 in image.size:
        raise InputError(f"{name} is {image.width} x {image.height} pixels, so it is empty.")
    image.load()
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format
    return turned


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if (
        array.ndim not in (2, 3)
        or not 1 <= channels <= 4
        or array.size == 0
        or array.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_)
    ):
        raise InputError(
            f"{name}, as an array, must be uint8, uint16 or boolean of shape (H, W) or (H, W, 1 to "
            f"4 channels), not {array.dtype} of shape {array.shape}."
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.itemsize == 2 and channels > 1:
        # Pillow does the same for 16-bit files with several channels.
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.itemsize == 2:
        array = array.astype(np.uint16)  # in the byte order of this machine
    return Image.fromarray(np.squeeze(array, 2) if array.shape[2:] == (1,) else array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _to_8_bits(image, name).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert(
            "RGB"
        )
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """A greyscale image of 16 or 32 bits, scaled to 8 bits; Pillow would clip it. An image of 32
    bits may hold levels of 16 or 8 bits or, as floats, fractions.
    """
    levels = np.asarray(image, dtype=np.float64)
    least, most = levels.min(), levels.max()
    if not (0 <= least <= most <= 65535):
        raise InputError(
            f"{name} has the levels {least:g}..{most:g}; they must be in 0..1, 0..255 or 0..65535."
        )
    if image.mode.startswith("I;16") or most > 255:
        levels = levels / 257.0
    elif image.mode == "F" and most <= 1:
        levels = levels * 255.0
    return Image.fromarray(levels.round().astype(np.uint8))


# --- Masks as people have them ---

_LARGEST_SHARE_ELSEWHERE = 0.1
"""The largest share of a mask's pixels that resemble neither its dark nor its bright side. COCO
masks with edges blurred by 4 pixels at 320 x 240 have at most 0.096, coloured ones as JPEG of
quality 5 have 0.062; 2 of 220 photographs have less.
"""

_NEAR = 0.1
"""The distance of the flat parts of a two-level mask from dark or bright after JPEG compression, as
a share of the distance from dark to bright.
"""

_LEAST_SHARE_DRAWN = 0.75
"""The least share of the two commonest colours in what is visible of a drawn mask; the rest are
soft edges. They make a small part of a photograph.
"""

_FEW_LEVELS = 16
"""JPEG artefacts have more levels than this, or no flat part at a separate level."""


def _levels(mask: ImageLike, name: str) -> tuple[np.ndarray, str | None]:
    """levels_HWC with one channel or three, and the format of the file that they came from."""
    if isinstance(mask, np.ndarray) and (mask.ndim == 2 or mask.shape[2:] == (1,)):
        if mask.dtype.kind not in "biuf" or mask.size == 0 or not np.isfinite(mask).all():
            raise InputError(
                f"{name}, as an array, must hold finite numbers or booleans in the shape (H, W) of "
                f"its image, not {mask.dtype} of shape {mask.shape}."
            )
        return mask.reshape(*mask.shape[:2], 1), None
    image = _open(mask, name)
    if (opacity_HW := _opacity_of_cut_out(image)) is not None:
        return opacity_HW[..., None], image.format
    one_channel = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
    if one_channel and "transparency" not in image.info:
        levels_HWC = np.asarray(image)[..., None]
        if not np.isfinite(levels_HWC).all():
            raise InputError(f"{name} has levels that are not finite numbers.")
        return levels_HWC, image.format
    return np.asarray(_to_rgb(image, name)), image.format


def _opacity_of_cut_out(image: Image.Image) -> np.ndarray | None:
    """The opacity (H, W) of a picture in which an object is cut out, as tools that remove the
    background write it: a part is transparent, and what is left is a photograph, or black. None for
    any other picture, whose brightness is the mask. Of a large picture only some pixels are
    checked.
    """
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return None
    rgba_HW4 = np.asarray(image.convert("RGBA"))
    opacity_HW = rgba_HW4[..., 3]
    visible_HW = opacity_HW >= 128
    if visible_HW.all() or not visible_HW.any():
        return None
    visible_N3 = rgba_HW4[visible_HW][:: max(1, visible_HW.size // 4_000_000), :3]
    codes_N = colour_codes(visible_N3)
    counts_K = np.sort(np.unique(codes_N, return_counts=True)[1])
    is_photograph = counts_K[-2:].sum() < _LEAST_SHARE_DRAWN * len(codes_N)
    return opacity_HW if is_photograph or not codes_N.any() else None


def _brightness(levels_HWC: np.ndarray) -> np.ndarray:
    """The brightness (H, W); for colours 1000 times the luma of ITU-R BT.601 in integers, so that
    equal colours are exactly equally bright.
    """
    if levels_HWC.shape[2] == 3:
        return levels_HWC.astype(np.int32) @ np.array([299, 587, 114], dtype=np.int32)
    levels_HW = levels_HWC[..., 0]
    is_small = levels_HW.dtype.kind in "biu" and levels_HW.dtype.itemsize <= 2
    return levels_HW.astype(np.int32 if is_small else np.float64)


def _third_levels(levels_HWC: np.ndarray, mask_HW: np.ndarray, format: str | None) -> str | None:
    """A description of what a mask has besides one dark and one bright level; None if there is
    nothing else.

    A level counts if it fills a square of 3 x 3 pixels: neither soft edges nor JPEG noise do so, at
    least not far from dark and bright. Near them (ids beside a border of 255), it counts if the
    mask has few levels in all.
    """
    codes_HW = levels_HWC[..., 0]
    if levels_HWC.shape[2] == 3:
        codes_HW = colour_codes(levels_HWC)
    flat_HW = _is_flat(codes_HW)
    rest_HW = flat_HW & ~mask_HW
    dark = commonest(codes_HW[rest_HW if rest_HW.any() else ~mask_HW])
    bright = commonest(codes_HW[mask_HW])
    third = np.unique(codes_HW[flat_HW & (codes_HW != dark) & (codes_HW != bright)])
    if not len(third):
        return None

    def colours(codes: np.ndarray) -> np.ndarray:
        if levels_HWC.shape[2] == 1:
            return codes.astype(np.float64)[:, None]
        return colours_of(codes).astype(np.float64)

    ends_2C = colours(np.array([dark, bright]))
    away_K = np.abs(colours(third)[:, None] - ends_2C).max(axis=2).min(axis=1)
    is_far = away_K.max() > _NEAR * np.abs(ends_2C[0] - ends_2C[1]).max()
    # Lossy WebP shifts flat parts a level or two away from black and white.
    if not is_far and (format == "WEBP" or len(np.unique(codes_HW)) > _FEW_LEVELS):
        return None
    examples = colours(np.unique([dark, bright, *third[:3]])).tolist()
    named = [", ".join(f"{level:g}" for level in colour) for colour in examples]
    named = [f"({name})" if "," in name else name for name in named]
    return f"it has areas of {', '.join(named[:-1])} and {named[-1]}"


def _many_levels(levels_HWC: np.ndarray, mask_HW: np.ndarray) -> str | None:
    """A message if too many pixels are far from the colours of both sides, as in a photograph;
    otherwise None. Only some pixels of a large mask are checked.
    """
    step = max(1, round((mask_HW.size / 4e6) ** 0.5))
    levels_HWC, mask_HW = levels_HWC[::step, ::step], mask_HW[::step, ::step]
    if mask_HW.all() or not mask_HW.any():
        return None
    dark_C, bright_C = (np.median(levels_HWC[side], axis=0) for side in (~mask_HW, mask_HW))
    away_HW = np.minimum(
        np.abs(levels_HWC - dark_C).max(axis=2), np.abs(levels_HWC - bright_C).max(axis=2)
    )
    share = np.mean(away_HW > np.abs(dark_C - bright_C).max() / 4)
    if share <= _LARGEST_SHARE_ELSEWHERE:
        return None
    return f"{share:.0%} of its pixels resemble neither the dark nor the bright part"


def _is_flat(codes_HW: np.ndarray) -> np.ndarray:
    """Whether each pixel equals its eight neighbours; without the edges."""
    same_in_row = np.zeros(codes_HW.shape, dtype=bool)
    same_in_row[:, 1:-1] = (codes_HW[:, :-2] == codes_HW[:, 1:-1]) & (
        codes_HW[:, 1:-1] == codes_HW[:, 2:]
    )
    flat_HW = np.zeros(codes_HW.shape, dtype=bool)
    flat_HW[1:-1] = same_in_row[:-2] & same_in_row[1:-1] & same_in_row[2:]
    flat_HW[1:-1] &= (codes_HW[:-2] == codes_HW[1:-1]) & (codes_HW[1:-1] == codes_HW[2:])
    return flat_HW


def commonest(codes: np.ndarray) -> Any:
    """The value that occurs most often, the least one in a tie; of at least one value."""
    values, counts = np.unique(codes, return_counts=True)
    return values[counts.argmax()]
