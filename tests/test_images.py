"""Images of every mode come out as the right RGB, what is no image is refused, and masks survive
the way to pixels and back.
"""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.images import (
    crop_and_resize,
    crop_and_resize_mask,
    load_image,
    mask_to_pixels,
    pixels_to_mask,
    to_image,
    to_pixels,
)

RED = (200, 30, 30)


def rgb(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def two_colours() -> Image.Image:
    """8 x 6, left half red, right half black."""
    image = Image.new("RGB", (8, 6))
    image.paste(RED, (0, 0, 4, 6))
    return image


def test_greyscale_has_equal_channels(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    pixels = rgb(tmp_path / "grey.png")
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    assert (pixels[:, 0, 0] == np.arange(256)).all()


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    two_colours().quantize(2).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    np.testing.assert_array_equal(rgb(tmp_path / "palette.png"), np.asarray(two_colours()))


def test_a_bilevel_image_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(rgb(tmp_path / "bits.png")[:, :, 0], np.eye(4) * 255)


@pytest.mark.parametrize(("top", "expected"), [(65535, [0, 64, 127, 255]), (255, [0, 0, 0, 1])])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, top: int, expected: list[int]) -> None:
    values = np.array([[0, top // 4, top // 2, top]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    assert rgb(tmp_path / "deep.png")[0, :, 0].tolist() == expected


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    two_colours().convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    pixels = rgb(tmp_path / "print.jpg")
    np.testing.assert_allclose(pixels[3, 1], RED, atol=12)
    np.testing.assert_allclose(pixels[3, 6], (0, 0, 0), atol=12)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_stands_over_black(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    image.convert(mode).save(tmp_path / "clear.png")
    assert rgb(tmp_path / "clear.png").tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_a_transparent_palette_colour_is_black(tmp_path: Path) -> None:
    image = two_colours().quantize(2)
    red = image.getpixel((0, 0))
    image.save(tmp_path / "clear.png", transparency=red)
    assert rgb(tmp_path / "clear.png").max() == 0


@pytest.mark.parametrize(
    ("orientation", "left_goes"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")]
)
def test_exif_turns_the_image_upright(tmp_path: Path, orientation: int, left_goes: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_colours().resize((80, 60)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "turned.jpg")
    assert image.size == ((80, 60) if orientation in (1, 3) else (60, 80))
    width, height = image.size
    point = {
        "left": (5, height // 2),
        "right": (width - 5, height // 2),
        "top": (width // 2, 5),
        "bottom": (width // 2, height - 5),
    }
    for side, (x, y) in point.items():
        red = image.getpixel((x, y))[0] > 150
        across = side in (
            left_goes,
            {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[left_goes],
        )
        if across:
            assert red == (side == left_goes), f"{side} is wrong"


def test_a_camera_file_with_a_second_view_is_a_still(tmp_path: Path) -> None:
    two_colours().resize((64, 48)).save(
        tmp_path / "stereo.jpg",
        format="MPO",
        save_all=True,
        append_images=[Image.new("RGB", (64, 48))],
    )
    np.testing.assert_allclose(rgb(tmp_path / "stereo.jpg")[24, 10], RED, atol=12)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"moving.{suffix}"
    two_colours().save(file, save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 255, 0))])
    with pytest.raises(InputError, match=rf"{re.escape(str(file))} is animated"):
        load_image(file)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jpg does not exist"):
        load_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"{re.escape(str(file))} cannot be read"):
        load_image(file)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.jpg").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read; it is damaged or no image"):
        load_image(tmp_path / "text.jpg")


def test_a_decompression_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(InputError, match=r"bomb\.png is too large"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]))
def test_damaged_bytes_give_an_image_or_a_sentence(
    tmp_path: Path, data: st.DataObject, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    two_colours().resize((32, 24)).save(
        buffer, format=kind, **({} if kind == "GIF" else {"exif": exif})
    )
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged").write_bytes(content)
    try:
        assert load_image(tmp_path / "damaged").mode == "RGB"
    except InputError as error:
        assert "damaged" in str(error)


def test_pixels_are_in_minus_one_to_one_and_come_back_exactly() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=2))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(to_image(pixels)), np.asarray(image))
    np.testing.assert_array_equal(np.asarray(to_image(pixels * 3))[0, 0], [0, 255, 0])


def test_a_crop_is_of_its_box() -> None:
    crop = crop_and_resize(two_colours(), (4, 0, 8, 6), 16)
    assert crop.size == (16, 16)
    # The filter reaches a pixel or two over the box's edge, as it does inside an image.
    assert np.asarray(crop)[:, 3:].max() == 0
    np.testing.assert_array_equal(
        np.asarray(crop_and_resize(two_colours(), (0, 0, 8, 6), 16)),
        np.asarray(two_colours().resize((16, 16))),
    )
    mask_HW = np.asarray(two_colours())[:, :, 0] > 0
    assert not crop_and_resize_mask(mask_HW, (4, 0, 8, 6), 16).any()
    assert crop_and_resize_mask(mask_HW, (0, 0, 4, 6), 16).all()


def test_a_mask_pixel_is_set_where_half_of_its_area_was() -> None:
    mask_HW = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]], dtype=bool)
    assert crop_and_resize_mask(mask_HW, (0, 0, 4, 4), 2).tolist() == [[True, False], [False, True]]
    mask_HW[0, 1] = False
    assert crop_and_resize_mask(mask_HW, (0, 0, 2, 2), 1).tolist() == [[True]]
    mask_HW[0, 0] = False
    assert crop_and_resize_mask(mask_HW, (0, 0, 2, 2), 1).tolist() == [[False]]


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_mask_survives_pixels(height: int, width: int, random: np.random.Generator) -> None:
    mask_HW = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    pixels = mask_to_pixels(mask_HW)
    assert pixels.shape == (3, height, width)
    assert set(pixels.unique().tolist()) <= {-1.0, 1.0}
    np.testing.assert_array_equal(pixels_to_mask(pixels), mask_HW)
