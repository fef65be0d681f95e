"""A region of an image: its caption, class and box, in examples and in the model's output."""

import json
import math
import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from icl_moe.boxes import Box, normalise_box
from icl_moe.errors import InputError
from icl_moe.inputs import json_error


@dataclass(frozen=True)
class Region:
    """A region of an image. box: x, y, width, height in pixels of that image. Values that a model's
    format lacks are None.

    log_probability: if a model wrote the region, the mean log-probability of its text's tokens
    (class and box in text included) among the tokens that could follow; None otherwise.
    """

    caption: str
    category: str | None = None
    box: tuple[float, float, float, float] | None = None
    log_probability: float | None = field(default=None, compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Region":
        """Read {"caption": ..., "category": ..., "box": [x, y, width, height]}; the last two may be
        left out. A model's own regions, with their log_probability, can be read too.

        Raises InputError for a file that is missing or holds anything else.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(_MOST_BYTES)
            # Some editors begin a file with a byte order mark.
            values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_twins)
        except OSError as error:
            raise InputError(f"The region {path} cannot be read ({error.strerror}).") from error
        except InputError as error:
            raise InputError(f"The region {path} is ambiguous: {error}") from error
        except json.JSONDecodeError as error:
            raise json_error(f"The region {path}", error) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"The region {path} is not valid JSON.") from error
        if not isinstance(values, dict) or not {"caption"} <= values.keys() <= _KEYS:
            raise InputError(
                f"{path} must hold "
                f'{{"caption": text, "category": text, "box": [x, y, width, height] in pixels}} '
                "and nothing else; category and box may be left out."
            )
        box = values.get("box")
        region = cls(**{**values, "box": tuple(box) if isinstance(box, list) else box})
        region.check(str(path))
        return region

    def check(self, name: str) -> None:
        """Raise InputError, which begins with `name`, if a value has the wrong type, a text is
        empty, or the box has no area.
        """
        for key, text in (("caption", self.caption), ("category", self.category)):
            if not (text is None and key == "category") and not _is_text(text):
                raise InputError(f"{name}: the {key} must be text, not {_short(text)}.")
        if self.box is not None and not _has_area(self.box):
            raise InputError(
                f"{name}: the box must be x, y, width and height in pixels, finite numbers with a "
                f"width and a height above 0, not {_short(self.box)}."
            )

    def box_in(self, size: tuple[int, int], name: str) -> Box:
        """The box, which must not be None, as fractions of its image of `size` (width, height)
        pixels, clipped to the image. Raises InputError if it lies outside.
        """
        assert self.box is not None
        x1, y1, x2, y2 = normalise_box(*self.box, *size)
        if x1 == x2 or y1 == y2:
            raise InputError(
                f"{name}: the box {_short(self.box)} lies outside its image, which is {size[0]} x "
                f"{size[1]} pixels."
            )
        return x1, y1, x2, y2


_KEYS = {"caption", "category", "box", "log_probability"}

_MOST_BYTES = 1 << 20
"""More bytes than any region has; reading a device would never end."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise InputError("a key occurs twice.")
    return values


def _is_text(value: Any) -> bool:
    """Whether it is text that is not blank and has no lone surrogates."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _has_area(box: Any) -> bool:
    try:
        _, _, width, height = (
            float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
            for value in box
        )
        return all(math.isfinite(float(value)) for value in box) and width > 0 and height > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _short(value: Any) -> str:
    text = ascii(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
