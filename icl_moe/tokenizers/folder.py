"""The folder format that all image tokenizers share: config.json with a fingerprint, and
model.safetensors. Also reads torch weights of other projects without running code in them.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.inputs import other_kind, other_kind_of, shipped_folders

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def find_tokenizer(source: str | Path, part: str) -> Path:
    """The folder `source`, or that of the shipped tokenizer of this name, or the tokenizer of the
    shipped model of this name. part: the tokenizer's folder in a model. Raises InputError if none
    exists.
    """
    models = shipped_folders("models", f"{part}/{CONFIG_FILE}")
    shipped = {
        **{name: model / part for name, model in models.items()},
        **shipped_folders("tokenizers/assets", CONFIG_FILE),
    }
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    folder = Path(source)
    if str(source) and folder.is_dir():  # No name would stand for the current folder.
        return folder
    raise InputError(
        f"There is no tokenizer folder {str(source) or 'without a name'} and no shipped tokenizer "
        f"of that name ({', '.join(shipped)})."
    )


def check_sides(pixels_B3HW: Tensor, downsampling: int) -> None:
    """Raise InputError if a side of the images is not a multiple of the downsampling."""
    height, width = pixels_B3HW.shape[-2:]
    if height % downsampling or width % downsampling or min(height, width) == 0:
        raise InputError(
            f"Image sides must be multiples of {downsampling} pixels, not {height} x {width}."
        )


def check_free(folder: Path, fingerprint: str | None = None) -> None:
    """Raise InputError if `folder` holds a tokenizer with another fingerprint, or another model,
    which would be overwritten.
    """
    if not any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return
    with contextlib.suppress(InputError):
        if _read_json(folder / CONFIG_FILE).get("fingerprint") == fingerprint is not None:
            return
    raise InputError(
        f"{folder} holds another tokenizer or model, which would be lost; choose another folder, "
        "or delete it."
    )


def weights_fingerprint(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """16 hex digits of a SHA-256 over plain settings and all weights as float32."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, value in sorted(weights.items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_folder(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    fingerprint: str,
    weights: Mapping[str, Tensor],
) -> None:
    """Write the folder; each file appears complete, the configuration last."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"kind": kind, **config, "fingerprint": fingerprint}
    write_whole(folder / WEIGHTS_FILE, save(dict(weights)))
    write_whole(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_config(path: Path, kind: str, title: str) -> tuple[dict[str, Any], str]:
    """The settings and the fingerprint of a folder's config.json. title: the name of this kind of
    tokenizer in messages.

    Raises InputError if the file is missing, not JSON, or of another kind.
    """
    content = _read_json(path)
    if content.pop("kind", None) != kind or not isinstance(content.get("fingerprint"), str):
        raise InputError(
            f"{path} is not {title}'s: it needs the keys kind ({kind}) and fingerprint."
        )
    fingerprint = content.pop("fingerprint")
    return content, fingerprint


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a config.json; empty if it is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing: a tokenizer folder holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON.") from error
    return content if isinstance(content, dict) else {}


def folder_kind(source: str | Path) -> str | None:
    """The kind of tokenizer that a folder holds; None if it does not record one."""
    with contextlib.suppress(InputError):
        return _read_json(Path(source) / CONFIG_FILE).get("kind")
    return None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InputError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        if kind := other_kind_of(path):
            raise InputError(f"{path} is {kind}.") from error
        raise InputError(f"{path} is missing or damaged ({error}).") from error


def check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: str) -> None:
    """Raise InputError if weights lack names, have surplus ones, or have other shapes."""
    missing, surplus = (
        [k for k in expected if k not in given],
        [k for k in given if k not in expected],
    )
    if missing or surplus:
        parts = [
            f"{word} {_listed(keys)}"
            for word, keys in (("lacks", missing), ("has the surplus", surplus))
            if keys
        ]
        raise InputError(f"{origin} does not fit its config: it {' and '.join(parts)}.")
    for key, value in expected.items():
        if given[key].shape != value.shape:
            shapes = f"{tuple(given[key].shape)} there and {tuple(value.shape)} by the config"
            raise InputError(f"{origin} contradicts its config: {key} is {shapes}.")


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _Inert:
    """An inert substitute for the one class that Lightning's checkpoints refer to (as a key of
    their callbacks' states).
    """


_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def check_file(path: Path, what: str) -> None:
    """Raise InputError if there is no regular file, since reading a device would never end. what:
    the beginning of messages, such as "The checkpoint".
    """
    try:
        if not path.is_file():
            missing = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{what} {path} {missing}.")
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}).") from error


def load_torch_weights(path: Path, what: str) -> dict[str, Tensor]:
    """Name -> weights from a file written by torch.save, such as a checkpoint with a 'state_dict'.
    what: see `check_file`.

    Raises InputError if the file is missing, is damaged, or holds anything but tensors and plain
    values.
    """
    check_file(path, what)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}).") from error
    is_archive = head.startswith(b"PK")  # as torch's files are
    if not is_archive and (kind := other_kind(head)):
        raise InputError(f"{what} {path} is {kind}.")
    try:
        with torch.serialization.safe_globals([(_Inert, _LIGHTNING_CALLBACK)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch raises the same error for bytes that are neither an archive nor a pickle.
        if not is_archive and not head.startswith(b"\x80"):
            raise InputError(f"{what} {path} is damaged or not a torch file.") from error
        raise InputError(
            f"{what} {path} holds more than weights and was not opened, as it could run code."
        ) from error
    except Exception as error:  # Damaged pickles raise many kinds of exceptions.
        raise InputError(
            f"{what} {path} is damaged or not a torch file ({first_line(error)})."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"{what} {path} holds no weights by name under 'state_dict'.")
    return state
