"""What the page computes: from what a browser sent to examples, and from photographs to results.
This module knows nothing of Gradio.
"""

import base64
import binascii
import contextlib
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from icl_moe.errors import InputError
from icl_moe.images import box_of_mask, load_image, load_mask
from icl_moe.inference.examples import squared_mask
from icl_moe.inference.model import InContextModel
from icl_moe.inference.region import Region
from icl_moe.rle import coco_annotation, encode_rle
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnMask

MOST_PHOTOGRAPHS = 50
"""Photographs of one run."""

MOST_EXAMPLES = 8
"""Examples that the page keeps; a model may read fewer (see `capacity`)."""

MEGABYTES = 25
"""The largest file that may be uploaded, and the largest picture that the marker may send."""

MEGAPIXELS = 50
"""The largest photograph: decoding one takes 3 bytes a pixel, and its mask 8."""

BATCH = 4
"""Photographs that are decoded together, and whose results appear together."""


@dataclass(frozen=True, eq=False)
class Example:
    """A photograph with what is shown in it: mask_HW (boolean) for masks, or a region for
    captions.
    """

    name: str
    picture: Image.Image
    mask_HW: np.ndarray | None = None
    region: Region | None = None

    @property
    def pair(self) -> tuple[Any, Any]:
        """The example as `InContextModel.session` takes it."""
        return self.picture, self.region if self.mask_HW is None else self.mask_HW


@dataclass(frozen=True, eq=False)
class Found:
    """The result for one photograph: a mask, or a region. picture: the photograph itself."""

    name: str
    picture: Image.Image
    drawn: DrawnMask | None = None
    region: Region | None = None


@dataclass
class Kept:
    """What is kept of all results for the downloads, without their pixels: compressed masks and
    annotations.
    """

    category: str = "object"
    masks: dict[str, bytes] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Found) -> None:
        # Readers take the name for the image, so that each may be there once.
        records = self.images if found.region is None else self.regions
        file_name = _free_name(found.name, [each["file_name"] for each in records])
        if found.region is not None:
            self.regions.append({"file_name": file_name, **asdict(found.region)})
            return
        assert found.drawn is not None
        mask_HW = found.drawn.mask_HW
        self.masks[_free_name(f"{Path(file_name).stem}_mask.png", self.masks)] = png(mask_HW)
        height, width = mask_HW.shape
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        if mask_HW.any():
            left, top, right, bottom = box_of_mask(mask_HW)
            self.annotations.append(
                coco_annotation(
                    encode_rle(mask_HW),
                    (left, top, right - left, bottom - top),
                    int(mask_HW.sum()),
                    found.drawn.score(),
                    id=len(self.annotations) + 1,
                    image_id=number,
                    category_id=1,
                )
            )

    def masks_zip(self) -> bytes:
        """All masks as PNG files in one ZIP archive."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:  # PNG files are compressed already.
            for name, mask in self.masks.items():
                archive.writestr(name, mask)
        return content.getvalue()

    def coco(self) -> dict[str, Any]:
        """COCO's instances format: masks as run lengths, with box, area and, if the model gives
        one, `DrawnMask.score`. Every photograph is listed, also one without a mask.
        """
        return {
            "info": {"description": "Masks that icl-moe wrote."},
            "licenses": [],  # CVAT refuses files without this list.
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": self.category, "supercategory": ""}],
        }


# --- From the browser ---


def only_uploaded(value: Any, folder: str | os.PathLike[str]) -> Any:
    """What a browser sent as the value of an input, with all files in it, however deep, reduced to
    their resolved paths: whatever else is said of a file, such as a URL, has no effect.

    folder: where uploaded files are stored. Raises InputError for a file that is not in it once
    links and ".." are resolved, and for a URL instead of a path.
    """
    if isinstance(value, list | tuple):
        return [only_uploaded(each, folder) for each in value]
    if not isinstance(value, dict):
        return value
    if not value.keys() & {"path", "url"}:
        return {key: only_uploaded(each, folder) for key, each in value.items()}
    try:
        place = Path(value["path"]).resolve()
        is_uploaded = place.is_relative_to(Path(folder).resolve()) and not place.is_dir()
    except (KeyError, TypeError, ValueError, OSError, RuntimeError):  # no path, or none that is one
        is_uploaded = False
    if not is_uploaded:
        raise InputError("A file was not uploaded to this page: choose it again.")
    return {"path": str(place), "meta": {"_type": "gradio.FileData"}}


def marked_example(marked: str | None, caption: str | None = None, category: str = "") -> Example:
    """The example that the page's marker wrote, as JSON: the file's name, the picture and its mask
    as data URLs, and the box that was drawn last, in pixels of the picture.

    caption: None for an example with a mask; otherwise the text of its region. Raises InputError
    if there is no picture, if nothing is marked, or if the content is damaged.
    """
    values = _values_of(marked)
    name, picture, mask, box = (values.get(key) for key in ("name", "picture", "mask", "box"))
    if not picture:
        raise InputError("There is no photograph to mark yet: choose one first.")
    name = _file_name(name) if isinstance(name, str) else "example"
    image = load_image(_from_data_url(picture, name), f"The image {name}")
    if caption is not None:
        return _captioned(name, image, box, caption, category)
    if not mask:
        raise InputError(f"Nothing is marked in {name} yet: draw a box or brush over the object.")
    drawing = load_image(_from_data_url(mask, f"the mask of {name}"), f"The mask of {name}")
    if drawing.size != image.size:
        raise InputError(f"The mask of {name} has another size than its photograph.")
    mask_HW = np.asarray(drawing.convert("L")) >= 128
    if not mask_HW.any():
        raise InputError(f"Nothing is marked in {name} yet: draw a box or brush over the object.")
    return Example(name, image, mask_HW)


def example_of(marked: str | None, image: str | None, mask: str | None) -> Example:
    """The example that was marked, see `marked_example`, or the one that was uploaded, see
    `uploaded_example`. Raises InputError also if it is not clear which one is meant.
    """
    if not image and not mask:
        return marked_example(marked)
    if _values_of(marked).get("mask"):
        raise InputError(
            "There are two examples, a marked one and an uploaded one: clear the marks, or remove "
            "the uploaded files."
        )
    return uploaded_example(image, mask)


def uploaded_example(image: str | None, mask: str | None) -> Example:
    """An example from the files of a photograph and its mask. Raises InputError if one is missing,
    cannot be read or is too large, or if they do not fit each other.
    """
    if not image or not mask:
        missing = "photograph" if not image else "mask"
        raise InputError(f"The {missing} is missing: choose both the photograph and its mask.")
    name = _file_name(image)
    picture = open_photograph(image)
    _check_file(mask)
    with _without_folders(mask):
        return Example(name, picture, load_mask(mask, picture.size))


def open_photograph(path: str | os.PathLike[str]) -> Image.Image:
    """The photograph as RGB. Raises InputError, which names the file without its folder, if it
    cannot be read or has more than `MEGAPIXELS`.
    """
    _check_file(path)
    with _without_folders(path):
        return load_image(path)


def _values_of(marked: str | None) -> dict[str, Any]:
    """What the page's marker wrote; empty if it holds no photograph."""
    try:
        values = json.loads(marked or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError("What the page sent of the example is damaged: load it again.")
    return values


def _captioned(name: str, image: Image.Image, box: Any, caption: str, category: str) -> Example:
    if not caption.strip():
        raise InputError(f"The caption of {name} is empty: describe the object in a few words.")
    corners = None
    if box is not None:
        try:
            x, y, width, height = (float(value) for value in box)
        except (TypeError, ValueError) as error:
            raise InputError(f"The box of {name} is damaged: draw it again.") from error
        corners = (x, y, width, height)
    region = Region(caption.strip(), category.strip() or None, corners)
    region.check(name)
    if corners is not None:
        region.box_in(image.size, name)
    return Example(name, image, region=region)


_DATA_URL = "data:image/"


def _from_data_url(url: Any, name: str) -> Image.Image:
    """The image of a data URL in base64, not decoded yet."""
    if not isinstance(url, str) or not url.startswith(_DATA_URL) or ";base64," not in url:
        raise InputError(f"What the page sent of {name} is damaged: load it again.")
    if len(url) > MEGABYTES * 1e6 * 4 / 3:
        raise InputError(f"{name} is larger than {MEGABYTES} megabytes.")
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has more than {MEGAPIXELS} million pixels.") from error
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"What the page sent of {name} is not an image.") from error
    _check_size(image, name)
    return image


def _check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError if a file's image is too large. A file that is not an image passes: the
    error is raised when it is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(image, _file_name(path))
    except InputError:
        raise
    except Exception:  # Damaged files raise many kinds of exceptions in Pillow.
        return


def _check_size(image: Image.Image, name: str) -> None:
    millions = image.width * image.height / 1e6
    if millions > MEGAPIXELS:
        raise InputError(
            f"{name} has {millions:.0f} million pixels; at most {MEGAPIXELS} million are allowed "
            "here: scale it down."
        )


@contextlib.contextmanager
def _without_folders(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file in messages without its folder, which is the server's and means nothing to the
    person at the page.
    """
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(os.fspath(path), _file_name(path))) from error


def _file_name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).replace("\\", "/").rpartition("/")[2] or "example"


# --- What a model can do ---


def can_segment(model: InContextModel) -> bool:
    return _was_trained(model, "segmentation")


def can_caption(model: InContextModel) -> bool:
    """Whether the model was trained for captions; of an older model that does not say, whether it
    has text.
    """
    return _was_trained(model, "captioning")


def _was_trained(model: InContextModel, task: str) -> bool:
    trained = model.decoder.config.classes
    return trained is None or task in trained


def capacity(model: InContextModel) -> int:
    """How many examples the model can read, at most `MOST_EXAMPLES`."""
    trained = [task for task in (SEGMENTATION, CAPTIONING) if _was_trained(model, task.name)]
    limits = [model.most_examples(task) for task in trained]
    return min([MOST_EXAMPLES, *(limit for limit in limits if limit is not None)])


def with_example(
    model: InContextModel, examples: Sequence[Example], example: Example
) -> tuple[Example, ...]:
    """The examples and one more; a model that reads a single one gets the new one instead. Raises
    InputError if the model reads no more, or if the example's mask is too small for it.
    """
    if example.mask_HW is not None:
        squared_mask(example.mask_HW, model.image_size, f"The mask of {example.name}")
    most = capacity(model)
    if most == 1:
        return (example,)
    if len(examples) >= most:
        raise InputError(f"This model reads at most {most} examples: remove one first.")
    return (*examples, example)


# --- Photographs to results ---


def check_queries(paths: Sequence[str] | None) -> list[str]:
    """Raises InputError if there are none, or too many."""
    if not paths:
        raise InputError("There are no photographs to search yet: add some first.")
    if len(paths) > MOST_PHOTOGRAPHS:
        raise InputError(
            f"These are {len(paths)} photographs; at most {MOST_PHOTOGRAPHS} are allowed at once. "
            "`icl-moe label` does a whole folder."
        )
    return list(paths)


def find(
    model: InContextModel,
    examples: Sequence[Example],
    paths: Sequence[str] | None,
    category: str = "",
    closer: bool = False,
    captions: bool = False,
) -> Iterator[Found | InputError]:
    """The results of the photographs, in their order: masks, or captions. A photograph that cannot
    be read is an InputError among the results. closer: whether masks are read again in windows, see
    `Session.segment`. Raises InputError if the model cannot use these examples.
    """
    queries = check_queries(paths)
    if not examples and not model.format.class_prompt:
        raise InputError("There is no example yet: mark an object in a photograph and add it.")
    session = model.session([example.pair for example in examples], category.strip() or None)
    answer = session.caption if captions else partial(session.draw, windows=closer)
    for start in range(0, len(queries), BATCH):
        batch = queries[start : start + BATCH]
        opened = [_open_or_error(path) for path in batch]
        # With an iterator, only one mask in a photograph's own size is in memory at a time.
        answers = answer(iter([result for result in opened if isinstance(result, Image.Image)]))
        for path, result in zip(batch, opened, strict=True):
            if isinstance(result, InputError):
                yield result
            else:
                yield _found(_file_name(path), result, next(answers))


def _found(name: str, picture: Image.Image, answer: Any) -> Found:
    if isinstance(answer, Region):
        return Found(name, picture, region=answer)
    return Found(name, picture, drawn=answer)


def _open_or_error(path: str) -> Image.Image | InputError:
    try:
        return open_photograph(path)
    except InputError as error:
        return error


# --- Of one mask ---


def png(mask_HW: np.ndarray) -> bytes:
    """A boolean mask as a PNG file, white on black."""
    content = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(content, "PNG", optimize=True)
    return content.getvalue()


def _free_name(name: str, taken: Iterable[str]) -> str:
    """`name`, or with a number if a photograph of another folder has taken it."""
    number, free = 2, name
    while free in taken:
        free = f"{Path(name).stem}_{number}{Path(name).suffix}"
        number += 1
    return free


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with no side longer than `side` pixels."""
    factor = side / max(picture.size)
    if factor >= 1:
        return picture
    size = (
        max(1, math.floor(picture.width * factor)),
        max(1, math.floor(picture.height * factor)),
    )
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
