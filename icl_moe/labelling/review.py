"""A page of labelled images as overlays, the least sure first."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from icl_moe.errors import InputError
from icl_moe.images import load_image
from icl_moe.inputs import whole_characters
from icl_moe.outputs import write_output
from icl_moe.pages import render
from icl_moe.pictures import COLOURS, overlaid
from icl_moe.rle import decode_rle

MOST_SHOWN = 400
"""More would make a page that browsers cannot open."""

_SIDE = 320


class _Shown(NamedTuple):
    """An image on the page; picture: None if it can no longer be read."""

    name: str
    text: str
    picture: Image.Image | None


def write_review(
    page: Path,
    folder: Path,
    classes: Sequence[str],
    entries: Callable[[], Iterator[dict[str, Any]]],
) -> None:
    """Write the page, with at most `MOST_SHOWN` images, those of which the model is least sure.
    entries: reads the entries of the journal from the first one on.
    """
    labelled = (entry for entry in entries() if "unread" not in entry)
    numbered = ((entry["sure"], number, entry) for number, entry in enumerate(labelled))
    least = heapq.nsmallest(MOST_SHOWN, numbered, key=lambda each: each[:2])
    total = sum("unread" not in entry for entry in entries())
    content = render(
        "review.html.j2",
        title="Labelled images, the least sure first",
        total=total,
        classes=[(name, COLOURS[n % len(COLOURS)]) for n, name in enumerate(classes)],
        images=[_shown(folder, classes, entry) for _, _, entry in least],
    )
    write_output(page, whole_characters(content))  # Names of files may hold bytes of any kind.


def _shown(folder: Path, classes: Sequence[str], entry: Mapping[str, Any]) -> _Shown:
    text = _text(classes, entry)
    try:
        image = load_image(folder / entry["file"])
    except InputError as error:
        return _Shown(entry["file"], str(error), None)
    size = [entry["height"], entry["width"]]
    image.thumbnail((_SIDE, _SIDE))
    for instance in entry["instances"]:
        mask_HW = decode_rle({"size": size, "counts": instance["counts"]})
        image = overlaid(image, mask_HW, COLOURS[(instance["category"] - 1) % len(COLOURS)])
    return _Shown(entry["file"], text, image)


def _text(classes: Sequence[str], entry: Mapping[str, Any]) -> str:
    """Such as "cat 0.81, dog 0.64 (least of 3)"."""
    scores: dict[int, list[float]] = {}
    for instance in entry["instances"]:
        scores.setdefault(instance["category"], []).append(instance["score"])
    found = [
        f"{classes[number - 1]} {min(of_class):.2f}"
        + (f" (least of {len(of_class)})" if len(of_class) > 1 else "")
        for number, of_class in scores.items()
    ]
    return ", ".join(found) or f"nothing found ({entry['sure']:.2f})"
