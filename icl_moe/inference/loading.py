"""Loading an exported model's decoder: what its files must hold, and that they belong together."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from icl_moe.errors import InputError
from icl_moe.inference.edges import EdgeFilter
from icl_moe.inputs import other_kind_of
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.sequence import SequenceFormat
from icl_moe.tokenizers import IMAGE_TOKENIZERS
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers


def load_decoder(folder: Path, dtype: torch.dtype | None) -> InContextDecoder:
    """The decoder in a model's folder, in the precision of the file unless `dtype` names another.
    Raises InputError if its files are damaged or disagree.
    """
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    try:
        config = _read_config(config_file)
        _check_weights(weights_file, config)
        with _without_bars():
            return InContextDecoder.from_pretrained(
                folder, config=config, local_files_only=True, dtype=dtype or "auto"
            )
    except InputError as error:
        # The readers of parts of the configuration do not know its folder.
        reason = str(error)
        if reason.startswith("config.json"):
            reason = f"{folder}/{reason}"
        raise InputError(reason) from error
    # Damaged files raise many kinds of exceptions, in transformers and below.
    except Exception as error:
        if kind := other_kind_of(weights_file):
            raise InputError(f"{weights_file} is {kind}.") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The model in {folder} cannot be read: config.json or model.safetensors is damaged or "
            f"they disagree ({type(error).__name__}: {reason[:200]})."
        ) from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Within this context transformers shows no progress, of which a small model needs none."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_weights(file: Path, config: DecoderConfig) -> None:
    """Raise InputError if a file's tensors do not fit this configuration.

    This precedes the construction of the model, since a wrong size could exhaust the memory.
    """
    with torch.device("meta"):
        wanted = {
            name: list(parameter.shape)
            for name, parameter in InContextDecoder(config).named_parameters()
        }
    with safe_open(file, framework="pt") as weights:
        found = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    for kind, names in (
        ("missing keys", wanted.keys() - found.keys()),
        ("unexpected keys", found.keys() - wanted.keys()),
        ("mismatched keys", {name for name in found if found[name] != wanted.get(name)}),
    ):
        if names:
            raise InputError(f"{file} does not fit its config.json: {kind}, such as {min(names)}.")


_SECTIONS = {
    "model": (
        "layers",
        "width",
        "heads",
        "positions",
        "feed_forward",
        "layers_with_experts",
        "experts",
        "experts_per_token",
        "gate_input",
        "combination",
    ),
    "vocabulary": ("text_merges", "image_codes", "tags"),
    "format": ("codes_per_image", "category", "box", "class_prompt", "prompt_length"),
}
"""Keys that every config.json has. If one were missing, the recipe's default could define another
network.
"""


def _read_config(config_file: Path) -> DecoderConfig:
    """The configuration of a model. Raises InputError, naming the key, if it is damaged."""
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("config.json is not valid JSON.") from error
    if not isinstance(values, dict):
        raise InputError("config.json must hold keys and values.")
    for section, keys in _SECTIONS.items():
        content = values.get(section)
        for key in keys:
            if not isinstance(content, dict) or key not in content:
                raise InputError(f"config.json lacks the key '{section}.{key}'.")
    for key, is_right, right in (
        ("image_size", _is_count(values.get("image_size")), "a whole number above 0"),
        *(
            (name, _is_fingerprint(values, name), "a fingerprint, or null")
            for name in IMAGE_TOKENIZERS
        ),
        ("classes", _are_names(values.get("classes")), "lists of names by task, or null"),
        (
            "mask_corruption",
            isinstance(values.get("mask_corruption", False), bool),
            "true or false",
        ),
        (
            "mask_threshold",
            _is_threshold(values.get("mask_threshold")),
            "null, or hold a value in 0..1 and the shards that it was fitted on",
        ),
        (
            "mask_edges",
            _are_edges(values.get("mask_edges")),
            "null, or hold a radius in 0..1, an epsilon and a slope above 0, and an offset",
        ),
    ):
        if not is_right:
            raise InputError(
                f"config.json: {key} must be {right}, not {str(values.get(key))[:60]!r}."
            )
    return DecoderConfig.from_pretrained(config_file.parent)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_fingerprint(values: dict[str, Any], name: str) -> bool:
    return values.get(name) is None or _is_name(values[name])


def _is_threshold(fitted: Any) -> bool:
    if fitted is None:
        return True
    value = fitted.get("value") if isinstance(fitted, dict) else None
    return isinstance(value, float) and 0 <= value <= 1 and _is_name(fitted.get("shards"))


def _are_edges(fitted: Any) -> bool:
    if fitted is None:
        return True
    values = fitted if isinstance(fitted, dict) else {}
    if not all(isinstance(values.get(field.name), float) for field in fields(EdgeFilter)):
        return False
    return 0 < values["radius"] <= 1 and values["epsilon"] > 0 and values["slope"] > 0


def _are_names(classes: Any) -> bool:
    if classes is None:
        return True
    return isinstance(classes, dict) and all(
        isinstance(names, list) and all(map(_is_name, names)) for names in classes.values()
    )


def check_tokenizers(config: Any, format: SequenceFormat, tokenizers: ImageTokenizers) -> None:
    """Raise InputError if the image tokenizers are not those that the model was trained with."""
    for name, found in tokenizers.fingerprints.items():
        theirs = getattr(config, name)
        if found != theirs and (theirs or name != "image_tokenizer"):
            ours = f"has the fingerprint {found}" if found else "is missing"
            raise InputError(
                f"The {name.replace('_', ' ')} {ours}, but the model was trained with "
                f"{theirs or 'none'}."
            )
    side, width = config.image_size or 0, tokenizers.downsampling
    if side % width or (side // width) ** 2 != format.codes_per_image:
        raise InputError(
            f"The image tokenizer does not encode the model's images of {config.image_size} pixels "
            f"as {format.codes_per_image} codes."
        )
    if reason := tokenizers.features_unlike(format.vocabulary):
        raise InputError(f"config.json: {reason}.")


def fingerprint_of(folder: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the configuration and the weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with (folder / "model.safetensors").open("rb") as weights:
        while chunk := weights.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
