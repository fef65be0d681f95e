"""Images of every mode become correct RGB, other input is refused, and masks survive the conversion
to pixels and back.
"""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from icl_moe.errors import InputError
from icl_moe.images import (
    crop_and_resize,
    crop_and_resize_mask,
    load_image,
    load_mask,
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
    with pytest.raises(InputError, match="cannot be read; it is damaged or not an image"):
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
        assert str(tmp_path / "damaged") in str(error)


def colourful(mode: str = "RGB") -> Image.Image:
    """30 x 20 pixels of different colours; half of them transparent if the mode supports it."""
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(30) * 8, np.arange(20)[:, None] * 12
    pixels[..., 3] = np.where(np.arange(30) < 15, 255, 100)
    return Image.fromarray(pixels).convert(mode)


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    colourful().save(path, exif=exif)


def save_16_bit_colours(path: Path, pixels_HW3: np.ndarray) -> None:
    """Write a PNG with 16 bits per channel, which Pillow reads but does not write."""
    height, width, _ = pixels_HW3.shape
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels_HW3]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        )
    )


DEEP = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109

WAYS_TO_SAVE = {
    "plain.png": lambda path: colourful().save(path),
    "side.png": lambda path: save_turned(path, 6),
    "down.jpg": lambda path: save_turned(path, 3),
    "mirrored.tiff": lambda path: save_turned(path, 2),
    "clear.png": lambda path: colourful("RGBA").save(path),
    "clear_grey.png": lambda path: colourful("LA").save(path),
    "clear_palette.gif": lambda path: colourful("RGBA").quantize(9).save(path, transparency=2),
    "clear_level.png": lambda path: colourful("L").save(path, transparency=8),
    "deep.png": lambda path: Image.fromarray(DEEP).save(path),
    "deep.tiff": lambda path: Image.fromarray(DEEP.astype(">u2")).save(path),
    "ints.tiff": lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path),
    "floats.tiff": lambda path: Image.fromarray(DEEP.astype(np.float32)).save(path),
    "bits.png": lambda path: colourful("1").save(path),
    "print.jpg": lambda path: colourful("CMYK").save(path),
    "colours.jp2": lambda path: colourful().save(path),
    "dot.png": lambda path: Image.new("RGB", (1, 1), RED).save(path),
}


@pytest.mark.parametrize("name", WAYS_TO_SAVE)
def test_an_image_is_the_same_as_a_file_and_as_a_pillow_image(tmp_path: Path, name: str) -> None:
    WAYS_TO_SAVE[name](tmp_path / name)
    by_path = rgb(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), by_path)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / name))), by_path)


ARRAYS = {
    "grey": np.asarray(colourful("L")),
    "grey with an axis": np.asarray(colourful("L"))[..., None],
    "grey and alpha": np.asarray(colourful("LA")),
    "colours": np.asarray(colourful()),
    "colours and alpha": np.asarray(colourful("RGBA")),
    "booleans": np.asarray(colourful("1")),
    "16 bits": DEEP,
    "16 bits, the other byte order": DEEP.astype(">u2"),
    "every other row and column": np.asarray(colourful().resize((60, 40), 0))[::2, ::2],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_what_a_file_of_it_is(tmp_path: Path, name: str) -> None:
    array = ARRAYS[name]
    Image.fromarray(np.squeeze(array, 2) if array.shape[2:] == (1,) else array).save(
        tmp_path / "file.png"
    )
    np.testing.assert_array_equal(np.asarray(load_image(array)), rgb(tmp_path / "file.png"))


def test_colours_of_16_bits_are_the_same_as_a_file_and_as_an_array(tmp_path: Path) -> None:
    pixels = np.stack([DEEP, DEEP.T.reshape(20, 30), DEEP[::-1]], axis=2)
    save_16_bit_colours(tmp_path / "deep.png", pixels)
    np.testing.assert_array_equal(np.asarray(load_image(pixels)), rgb(tmp_path / "deep.png"))
    assert rgb(tmp_path / "deep.png").max() > 250


def test_floats_may_be_fractions(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "fractions.tiff")
    assert rgb(tmp_path / "fractions.tiff")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("levels", [[0, np.nan], [-3, 200], [0, 1e6], [0, np.inf]])
def test_levels_of_no_scale_are_refused(tmp_path: Path, levels: list[float]) -> None:
    Image.fromarray(np.array([levels], np.float32)).save(tmp_path / "odd.tiff")
    with pytest.raises(InputError, match=r"odd\.tiff has the levels .*they must be in"):
        load_image(tmp_path / "odd.tiff")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4)),
        np.zeros((4, 4), np.int64),
        np.zeros((4, 4), object),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((3, 4, 6), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.uint8(7),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_an_array_that_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"^The query.* must be "):
        load_image(image, "The query")


@pytest.mark.parametrize("image", [None, 3, b"dog.jpg", [[0, 1]], torch.zeros(3, 4, 4)])
def test_what_is_no_image_at_all_is_refused(image: object) -> None:
    with pytest.raises(InputError, match="The query must be a path, a Pillow image or a NumPy"):
        load_image(image, "The query")  # type: ignore[arg-type]


def test_a_pillow_image_that_cannot_be_read_is_refused_like_its_file(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    closed = Image.open(tmp_path / "cut.png")
    closed.close()
    colourful().save(tmp_path / "moving.gif", save_all=True, append_images=[two_colours()])
    for image, message in (
        (Image.open(io.BytesIO(content[:2000])), "cannot be read; it is damaged"),
        (closed, "cannot be read; it is damaged"),
        (Image.open(tmp_path / "moving.gif"), "is animated"),
        (Image.new("RGB", (0, 5)), "is 0 x 5 pixels"),
    ):
        with pytest.raises(InputError, match=f"The query {message}"):
            load_image(image, "The query")


def test_a_path_that_leads_to_no_file_is_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is not a file"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / ("a" * 400), "cannot be read .File name too long"),
        ("", "is not a file"),
    ):
        with pytest.raises(InputError, match=message):
            load_image(path)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_size_is_said_and_nothing_below_it_is_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    two_colours().save(tmp_path / "48.png")
    assert load_image(tmp_path / "48.png").size == (8, 6)
    Image.new("RGB", (9, 9)).save(tmp_path / "81.png")
    with pytest.raises(InputError, match=r"81\.png is too large: 80 pixels are allowed"):
        load_image(tmp_path / "81.png")


def disc(side: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return (rows - 30) ** 2 + (columns - 36) ** 2 < 20**2


def palette(mask_HW: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(mask_HW.astype(np.uint8)).convert("P")
    image.putdata(mask_HW.astype(np.uint8).ravel().tolist())
    image.putpalette(colours)
    return image


def painted(mask_HW: np.ndarray, colour: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(mask_HW[..., None].astype(np.uint8) * np.array(colour, np.uint8))


MASKS = {
    "white on black": lambda m: Image.fromarray(m.astype(np.uint8) * 255),
    "levels 0 and 1": lambda m: Image.fromarray(m.astype(np.uint8)),
    "levels 180 and 200": lambda m: Image.fromarray(np.where(m, 200, 180).astype(np.uint8)),
    "one bit": lambda m: Image.fromarray(m),
    "16 bits, 0 and 1": lambda m: Image.fromarray(m.astype(np.uint16)),
    "16 bits, 0 and 65535": lambda m: Image.fromarray(m.astype(np.uint16) * np.uint16(65535)),
    "a palette": lambda m: palette(m, [0, 0, 0, 128, 0, 0]),
    "a palette of the same with more entries": lambda m: palette(m, [0, 0, 0, 1, 2, 3] + [9] * 600),
    "colours": lambda m: painted(m, (20, 30, 220)),
    "opaque": lambda m: painted(m, (255, 255, 255)).convert("RGBA"),
    "white on transparent": lambda m: painted(m, (255, 255, 255, 255)),
    "white all over, opaque on the object": lambda m: Image.merge(
        "LA", [Image.new("L", (64, 64), 255), Image.fromarray(m.astype(np.uint8) * 255)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", MASKS)
def test_a_mask_of_two_levels_is_true_on_the_brighter_one(tmp_path: Path, way: str) -> None:
    MASKS[way](disc()).save(tmp_path / "mask.png")
    for mask in (tmp_path / "mask.png", Image.open(tmp_path / "mask.png")):
        np.testing.assert_array_equal(load_mask(mask, (64, 64)), disc())


@pytest.mark.parametrize(
    "dtype", ["bool", "u1", "i1", "u2", ">u2", "i4", "u8", "i8", "f2", "f4", "f8"]
)
def test_a_mask_may_be_an_array_of_any_numbers(dtype: str) -> None:
    for array in (disc().astype(dtype), disc().astype(dtype)[..., None]):
        np.testing.assert_array_equal(load_mask(array, (64, 64)), disc())
    np.testing.assert_array_equal(load_mask(np.dstack([disc().astype("u1")] * 3), (64, 64)), disc())


def test_a_mask_is_turned_upright_as_its_image_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    mask_HW = disc()[:50]
    Image.fromarray(mask_HW).convert("L").save(tmp_path / "side.png", exif=exif)
    np.testing.assert_array_equal(load_mask(tmp_path / "side.png", (50, 64)), np.rot90(mask_HW, -1))
    with pytest.raises(
        InputError, match=r"64 x 50 .* is 50 x 64; if EXIF data turn the image, the"
    ):
        load_mask(mask_HW, (50, 64))


@pytest.mark.parametrize(
    ("format", "quality"),
    [("JPEG", quality) for quality in (5, 20, 50, 75, 90, 95, 100)] + [("WEBP", 30), ("WEBP", 90)],
)
@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 30, 90)])
def test_the_traces_of_compression_are_rounded(
    format: str, quality: int, colour: tuple[int, ...]
) -> None:
    file = io.BytesIO()
    painted(disc(), colour).save(file, format, quality=quality)
    assert np.mean(load_mask(Image.open(file), (64, 64)) != disc()) < 0.015


def test_soft_edges_are_rounded() -> None:
    for radius in (0.5, 1, 2):
        soft = MASKS["white on black"](disc()).filter(ImageFilter.GaussianBlur(radius))
        assert np.mean(load_mask(soft, (64, 64)) != disc()) < 0.01
    half = MASKS["white on black"](disc()).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.mean(load_mask(half, (32, 32)) != disc()[::2, ::2]) < 0.02


def test_a_mask_of_one_level_marks_everything() -> None:
    for level in (1, 255):
        assert load_mask(np.full((5, 4), level, np.uint8), (4, 5)).all()
    assert load_mask(Image.new("RGB", (4, 5), (1, 1, 2)), (4, 5)).all()


@pytest.mark.parametrize(
    "mask",
    [
        Image.new("L", (64, 64)),
        np.zeros((64, 64), bool),
        np.zeros((64, 64)),
        palette(disc(), [0] * 768),
        MASKS["white on transparent"](disc() & False),
    ],
)
def test_a_mask_that_marks_nothing_is_refused(mask: Image.Image | np.ndarray) -> None:
    with pytest.raises(InputError, match="The mask marks nothing"):
        load_mask(mask, (64, 64))


def labels() -> np.ndarray:
    """Ids 1 and 2 of two objects, touching."""
    return disc().astype(np.uint8) + (disc() & (np.arange(64) > 36)).astype(np.uint8)


def with_border(level: int) -> np.ndarray:
    """A class's level within a border of 255, as in Pascal VOC."""
    mask = Image.fromarray(disc())
    wide = np.asarray(mask.convert("L").filter(ImageFilter.MaxFilter(3))) > 0
    return np.where(disc(), level, np.where(wide, 255, 0)).astype(np.uint8)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (labels(), "it has areas of 0, 1 and 2"),
        (labels().astype(float) / 2, "it has areas of 0, 0.5 and 1"),
        (Image.fromarray(labels() * np.uint8(100)), "it has areas of 0, 100 and 200"),
        (Image.fromarray(with_border(1)), "it has areas of 0, 1 and 255"),
        (with_border(20), "it has areas of 0, 20 and 255"),
        (palette(labels(), [0, 0, 0, 255, 0, 0, 76, 76, 76]), r"areas of \(0, 0, 0\), \(76, 76, 7"),
        (colourful().resize((64, 64), Image.Resampling.BICUBIC), "of its pixels resemble neither"),
        (np.tile(np.arange(64, dtype=np.uint8), (64, 1)), "resemble neither|has areas"),
        (np.where(disc(), -1, 0), "has the level -1; levels must be at least 0"),
        (np.where(disc(), np.nan, 0), "must hold finite numbers"),
        (np.full((64, 64), "x"), "must hold finite numbers"),
        (np.zeros((64, 64, 64), np.uint8), "must be uint8, uint16 or boolean of shape"),
        (disc()[:, :50], "The mask is 50 x 64 pixels, but its image is 64 x 64"),
    ],
)  # fmt: skip
def test_a_mask_of_several_levels_is_refused(mask: Image.Image | np.ndarray, found: str) -> None:
    with pytest.raises(InputError, match=found):
        load_mask(mask, (64, 64))


def test_real_masks_are_taken_and_real_label_maps_are_not(real_data: Path) -> None:
    """Masks of photographed objects, also as JPEG; and label maps with all objects of an image as
    ids.
    """
    content = json.loads(
        (real_data / "coco2017_sample/annotations/instances_val2017.json").read_bytes()
    )
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    by_image: dict[int, list] = {}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    for number, annotations in list(by_image.items())[:25]:
        size = sizes[number]
        ids = Image.new("L", size)
        for label, annotation in enumerate(annotations, 1):
            for polygon in annotation["segmentation"]:
                ImageDraw.Draw(ids).polygon(polygon, fill=label)
        first = ids.point(lambda level: 255 if level == 1 else 0)
        if first.getextrema()[1]:
            file = io.BytesIO()
            first.save(file, "JPEG", quality=85)
            agrees = load_mask(Image.open(file), size) == load_mask(first, size)
            assert agrees.mean() > 0.995
        if ids.histogram()[1:].count(0) < 253 and max(sorted(ids.histogram()[1:])[-2:-1]) > 400:
            with pytest.raises(InputError, match="does not have two levels"):
                load_mask(ids, size)


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
    # The filter reaches a pixel or two beyond the edge of the box.
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


def cut_out(colours_HW3: np.ndarray, mask_HW: np.ndarray) -> Image.Image:
    opacity_HW1 = np.where(mask_HW, 255, 0).astype(np.uint8)[..., None]
    return Image.fromarray(np.concatenate([colours_HW3, opacity_HW1], axis=2))


def test_what_is_not_transparent_of_a_cut_out_object_is_its_mask(tmp_path: Path) -> None:
    """As tools that remove the background write it: the photograph's own colours, dark ones too."""
    rng = np.random.default_rng(0)
    mask_HW = np.zeros((40, 60), dtype=bool)
    mask_HW[5:30, 10:50] = True
    photograph = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    photograph[:20] //= 8  # Its upper half is nearly black.
    black, white = np.zeros_like(photograph), np.full_like(photograph, 255)
    for colours_HW3 in (photograph, black, white):
        cut_out(colours_HW3, mask_HW).save(tmp_path / "mask.png")
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", (60, 40)), mask_HW)
    grey = Image.fromarray(np.where(mask_HW, 255, 0).astype(np.uint8))
    black_on_transparent = Image.merge("LA", [Image.new("L", grey.size), grey])
    np.testing.assert_array_equal(load_mask(black_on_transparent, (60, 40)), mask_HW)
    monochrome = np.repeat(photograph[..., :1], 3, axis=2)
    for picture in (cut_out(monochrome, mask_HW), cut_out(monochrome, mask_HW).convert("LA")):
        np.testing.assert_array_equal(load_mask(picture, (60, 40)), mask_HW)
    # A drawn mask with coloured fringes, in a picture with a transparent border.
    fringed = white * mask_HW[..., None]
    fringed[5:30, 10] = rng.integers(100, 256, (25, 3))
    inner_HW = np.zeros_like(mask_HW)
    inner_HW[2:38, 2:58] = True
    found_HW = load_mask(cut_out(fringed, inner_HW), (60, 40))
    assert np.mean(found_HW != mask_HW) < 0.02
    opaque = Image.fromarray(white * mask_HW[..., None]).convert("RGBA")
    np.testing.assert_array_equal(load_mask(opaque, (60, 40)), mask_HW)
