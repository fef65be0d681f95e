"""The results as HTML: each photograph with its mask, its confidence or its caption over it. The
layers are laid over each other by the browser, so that changing the view needs no server. This
module knows nothing of Gradio.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.images import box_of_mask
from icl_moe.pages import render
from icl_moe.pictures import BOX_COLOUR, boxed
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.web.work import Example, Found, Kept, png, shrunk

SIDE = 720
"""Pixels along the longer side of a picture on the page."""

THUMBNAIL = 240

MASK_COLOUR = (0, 196, 170)

UNSURE = 0.3
"""The score below which a card says that the model is not sure of its mask. It only advises the
user to look, since the overlap that a model expects is not calibrated.
"""


def _confidence_colours() -> np.ndarray:
    """32 colours of the map viridis, from unsure (0.5) to sure (1), with opacity. It is readable by
    people who do not see all colours, and in grey.
    """
    five = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
    places = np.linspace(0, 4, 32)
    colours = [np.interp(places, range(5), five[:, channel]) for channel in range(3)]
    return np.stack([*colours, np.full(32, 190.0)], axis=1).round().astype(np.uint8)


_CONFIDENCE_COLOURS = _confidence_colours()


@dataclass(frozen=True)
class Card:
    """What the template shows of one photograph. Pictures are data URLs. sure: the score of a mask,
    and sure_of: what it is, in words.
    """

    name: str
    photo: str
    alt: str
    mask: str = ""
    rest: str = ""
    confidence: str = ""
    area: str = ""
    sure: float | None = None
    sure_of: str = ""
    caption: str = ""
    category: str = ""
    box: tuple[float, float, float, float] | None = None
    download: str = ""
    download_name: str = ""

    @property
    def is_unsure(self) -> bool:
        return self.sure is not None and self.sure < UNSURE


def card_of(found: Found) -> Card:
    """The card of a result. Its pictures are at most `SIDE` pixels long; the mask to download has
    the photograph's own size.
    """
    photo = shrunk(found.picture, SIDE)
    picture = _jpeg_url(photo)
    if found.region is not None:
        region = found.region
        return Card(
            found.name,
            picture,
            f"{found.name}: {region.caption}",
            caption=region.caption,
            category=region.category or "",
            box=_in_percent(region.box, found.picture.size),
        )
    assert found.drawn is not None
    mask_HW, share = found.drawn.mask_HW, float(found.drawn.mask_HW.mean())
    small = found.drawn.resized(photo.height, photo.width)
    area = f"{share:.1%} marked" if mask_HW.any() else "nothing found"
    return Card(
        found.name,
        picture,
        f"{found.name}: {area}{_where(mask_HW)}",
        mask=_layer_url(_tinted(small.mask_HW), _TINT),
        rest=_layer_url(small.mask_HW.astype(np.uint8), _VEIL),
        confidence=_confidence_url(found.drawn, *photo.size),
        area=area,
        # Where nothing is marked, the score is another quantity, of one pixel.
        sure=found.drawn.score() if mask_HW.any() else None,
        sure_of="expected overlap" if found.drawn.at_once else "confidence",
        download=_url(png(mask_HW), "image/png"),
        download_name=f"{Path(found.name).stem}_mask.png",
    )


def results_page(
    cards: Sequence[Card | InputError], kept: Kept, total: int, captions: bool = False
) -> str:
    """The HTML of the results so far. total: how many photographs there are in all. The downloads
    are offered once all are done.
    """
    return render(
        "web_results.html.j2",
        cards=[card for card in cards if isinstance(card, Card)],
        errors=[str(card) for card in cards if isinstance(card, InputError)],
        total=total,
        captions=captions,
        downloads=_downloads(kept, captions) if len(cards) == total else [],
        box_colour=f"rgb{BOX_COLOUR}",
    )


def examples_page(examples: Sequence[Example], problem: str = "") -> str:
    """The HTML of the examples that are in use, each with a button that removes it. problem: a
    sentence that says why another one was not taken.
    """
    return render(
        "web_examples.html.j2",
        problem=problem,
        examples=[
            {
                "name": example.name,
                "picture": _jpeg_url(_shown_example(example)),
                "text": _text_of(example),
            }
            for example in examples
        ],
    )


def message(text: str) -> str:
    """The HTML of one sentence that says what is wrong."""
    return f'<p class="icl-error" role="alert">{escape(text)}</p>'


def _downloads(kept: Kept, captions: bool) -> list[tuple[str, str, str]]:
    """The label, file name and data URL of each download of all results."""
    if captions:
        if not kept.regions:
            return []
        text = json.dumps(kept.regions, ensure_ascii=False, indent=1)
        return [("All captions (JSON)", "captions.json", _url(text.encode(), "application/json"))]
    if not kept.masks:
        return []
    instances = json.dumps(kept.coco(), ensure_ascii=False).encode()
    return [
        ("All masks (ZIP)", "masks.zip", _url(kept.masks_zip(), "application/zip")),
        ("COCO JSON", "instances.json", _url(instances, "application/json")),
    ]


def _shown_example(example: Example) -> Image.Image:
    picture = shrunk(example.picture, THUMBNAIL)
    if example.mask_HW is not None:
        mask = Image.fromarray(example.mask_HW.astype(np.uint8) * 255).resize(picture.size)
        layer = Image.fromarray(_TINT[_tinted(np.asarray(mask) >= 128)])
        return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")
    if example.region is not None and example.region.box is not None:
        return boxed(picture, example.region.box_in(example.picture.size, example.name))
    return picture


def _text_of(example: Example) -> str:
    if example.region is not None:
        return example.region.caption
    assert example.mask_HW is not None
    return f"{example.mask_HW.mean():.1%} marked"


def _where(mask_HW: np.ndarray) -> str:
    """The place of a mask in words, for those who do not see it."""
    if not mask_HW.any():
        return ""
    left, top, right, bottom = box_of_mask(mask_HW)
    return f", in the box from ({left}, {top}) to ({right}, {bottom}) pixels"


_TINT = np.array([(12, 14, 18, 70), (*MASK_COLOUR, 70), (255, 255, 255, 240)], dtype=np.uint8)
"""A light veil over the rest, a light tint on the mask, and its white outline; red, green, blue and
opacity.
"""

_VEIL = np.array([(12, 14, 18, 225), (0, 0, 0, 0)], dtype=np.uint8)
"""A dark veil over everything outside of the mask."""


def _tinted(mask_HW: np.ndarray) -> np.ndarray:
    """For each pixel its number in `_TINT`, uint8."""
    return mask_HW.astype(np.uint8) + (mask_HW & ~_inner(mask_HW, 2))


def _inner(mask_HW: np.ndarray, pixels: int) -> np.ndarray:
    """The mask without its outermost `pixels`; the edge of the picture is no edge of the mask."""
    for _ in range(pixels):
        m = np.pad(mask_HW, 1, mode="edge")
        mask_HW = mask_HW & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
    return mask_HW


def _confidence_url(drawn: DrawnMask, width: int, height: int) -> str:
    """The confidence in colours, to lay over the photograph; empty if there is none."""
    confidence_HW = drawn.resized(max(1, height // 2), max(1, width // 2)).confidence_HW
    if confidence_HW is None:
        return ""
    last = len(_CONFIDENCE_COLOURS) - 1
    numbers_HW = (np.clip(2 * confidence_HW - 1, 0, 1) * last).round().astype(np.uint8)
    return _layer_url(numbers_HW, _CONFIDENCE_COLOURS)


def _layer_url(numbers_HW: np.ndarray, colours_K4: np.ndarray) -> str:
    """A picture of few colours with opacity, as a PNG with a palette, which is small."""
    layer = Image.fromarray(numbers_HW)
    layer.putpalette(colours_K4[:, :3].tobytes())
    content = io.BytesIO()
    layer.save(content, "PNG", optimize=True, transparency=colours_K4[:, 3].tobytes())
    return _url(content.getvalue(), "image/png")


def _in_percent(
    box: tuple[float, float, float, float] | None, size: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """left, top, width and height of a box in percent of its picture, for CSS."""
    if box is None:
        return None
    x, y, width, height = box
    return (
        round(100 * x / size[0], 2),
        round(100 * y / size[1], 2),
        round(100 * width / size[0], 2),
        round(100 * height / size[1], 2),
    )


def _jpeg_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return _url(content.getvalue(), "image/jpeg")


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
