"""Weights of published models, from a folder or the Hugging Face Hub by transformers."""

from pathlib import Path
from typing import Any

from icl_moe.errors import InputError


def load_published(kind: Any, weights: str, what: str) -> Any:
    """`kind.from_pretrained(weights)`. kind: a class of transformers. what: begins the sentence of
    the InputError that is raised if that is impossible, such as "SegGPT's weights".
    """
    if weights.count("/") > 1 and not Path(weights).is_dir():
        raise InputError(f"{what} {weights} cannot be loaded: there is no such folder.")
    try:
        return kind.from_pretrained(weights)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{what} {weights} cannot be loaded; name a folder or a Hub id with --weights ({why})."
        ) from error
