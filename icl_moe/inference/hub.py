"""Finds models (a folder, one that ships with the package, or one of the Hugging Face Hub) and
uploads them.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from icl_moe.errors import InputError
from icl_moe.files import check_readable
from icl_moe.inference.model_card import CARD, TRAINING, model_card
from icl_moe.inputs import shipped_folders

_FILES = ("*.json", "*.safetensors", "*.txt", CARD)
"""The files of a model folder; no others are fetched from a Hub repository."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def find_model(source: str | Path) -> Path:
    """The folder of a model.

    source: the name of a shipped model; a folder; or a model of the Hugging Face Hub, OWNER/NAME or
    OWNER/NAME@REVISION, which is fetched into the Hub's cache. A shipped name takes precedence over
    a folder (write ./demo, or give a Path, for a folder), and a folder over the Hub. Raises
    InputError if none of these exists.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"A model is a folder or a name, not {type(source).__name__}.")
    if not str(source):
        raise InputError("The name of the model is empty; it must be a folder or a name.")
    name, shipped = str(source), shipped_folders("models", "config.json")
    folder = Path(source)
    if name in shipped and (isinstance(source, str) or not folder.exists()):
        return shipped[name]
    if folder.exists():
        return folder
    if not _HUB_ID.fullmatch(name):
        known = f" ({', '.join(shipped)})" if shipped else ""
        raise InputError(
            f"There is no model folder {source}, no shipped model of that name{known}, and a "
            "model of the Hugging Face Hub is named OWNER/NAME."
        )
    return _fetch(name)


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise InputError if a model folder lacks one of these files or folders, or if one cannot be
    read.
    """
    for name in names:
        try:
            check_readable(folder / name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{folder} is not an exported model: it lacks {name}; `icl-moe export` writes one."
            ) from error
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def push_model(
    folder: Path, repository: str, metrics: Path | None, private: bool | None, token: str | None
) -> str:
    """Upload a model folder as `repository` (OWNER/NAME), in one commit. Its card is the folder's
    own, or with `metrics` a new one that has these scores. Returns the address of the commit.

    private: whether a repository that must be created is private; None leaves it to the owner's
    settings. Raises InputError if the Hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    contents: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in _FILES
        for path in sorted(folder.rglob(pattern))
    }
    if metrics is not None or CARD not in contents:
        card = _card(folder, metrics)
        if card is not None:
            contents[CARD] = card.encode()
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message="Upload an in-context model",
        )
    except Exception as error:  # The Hub's client raises many kinds, network and login among them.
        raise InputError(f"{repository} was not written to the Hub: {_reason(error)}.") from error
    return str(commit.commit_url)


def _card(folder: Path, metrics: Path | None) -> str | None:
    """The model's card; None if the folder does not record how it was trained."""
    try:
        training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return model_card(config, training, metrics)
    except FileNotFoundError as error:
        if metrics is not None and error.filename == str(metrics):
            raise InputError(f"There is no file {metrics}.") from error
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"No model card can be written for {folder}: config.json, {TRAINING} or the metrics "
            f"are damaged ({type(error).__name__}: {error})."
        ) from error


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=list(_FILES))
        )
    except Exception as error:  # The Hub's client raises many kinds, network and login among them.
        raise InputError(
            f"There is no model folder {name}, and no model of that name could be fetched from the "
            f"Hugging Face Hub: {_reason(error)}."
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of an error of the Hub's client."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message.split('. ')[0][:200].rstrip('.')}"
