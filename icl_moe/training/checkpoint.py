"""Checkpoints of a run, and the exported model that inference reads.

A run's output folder holds run.json, model/ (what an exported model needs besides weights) and
checkpoints/, with one folder for each saved step. Such a folder holds the files of
training_state.py and complete.json, which is written last. DeepSpeed's own files are not among
them: they can only be resumed in the layout that wrote them, and would hold the same numbers again.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import PretrainedConfig

from icl_moe.data.shards import TOKENIZER_FOLDERS, ShardSet
from icl_moe.devices import Device, find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.fitting import fit_masks
from icl_moe.files import copy_folder, flush_to_disk, give_usual_mode, write_whole
from icl_moe.inference.model import InContextModel
from icl_moe.inference.model_card import CARD, TRAINING, model_card
from icl_moe.inputs import read_json
from icl_moe.messages import say
from icl_moe.model.config import DecoderConfig, joined_classes
from icl_moe.model.decoder import InContextDecoder
from icl_moe.outputs import output_folder
from icl_moe.training import training_state
from icl_moe.training.mean_weights import OtherModel, mean_weights
from icl_moe.training.run_folder import how_it_was_trained, saved_steps

_TAG = "step-{:08d}"
_NAME = re.compile(r"step-\d{8,}")
_CONFIG = "config.json"
_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
_PARTIAL = ".partial"
"""The folder in which an export is written before it replaces an earlier one."""

_COMPLETE = "complete.json"
"""Written into the folder of a checkpoint last: its files and their sizes. Without it, or if they
differ, the checkpoint is incomplete.
"""


def save(engine: Any, output: Path, step: int, keep: int) -> bool:
    """Save the whole training state after `step` steps, then remove older checkpoints. Every rank
    calls it and is told whether there is a checkpoint of that step now.

    output: a folder that all ranks can access. keep: how many complete checkpoints are kept;
    damaged ones do not count, and the one just saved is never removed. If a checkpoint cannot be
    written, the ranks that find the reason report it, and its files are removed.
    """
    checkpoints = output / "checkpoints"
    folder = checkpoints / _TAG.format(step)
    is_main = dist.get_rank() == 0
    needed = torch.tensor(training_state.size(engine), device=engine.device)
    dist.all_reduce(needed)

    def make_room() -> None:
        if is_main:
            _make_room(folder, int(needed))

    def complete() -> None:
        if is_main:
            _complete(folder)

    saved = (
        training_state.attempt(engine, folder, make_room)
        and training_state.write(engine, folder, step)
        and training_state.attempt(engine, folder, complete)
    )
    if is_main:
        if saved:
            _retain(checkpoints, folder, keep)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return saved


def resume(engine: Any, output: Path) -> int:
    """Load the newest complete checkpoint of a run and return its number of completed steps, or 0
    if there is no checkpoint. Every rank calls it.

    The layout may differ from the one that saved. A damaged checkpoint is named, and the one
    before it is used. Raises InputError if all are damaged, and for a checkpoint of another model
    or optimizer.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:  # Only rank 0 checks the size of every file.
        try:
            found[0] = _newest_whole(output / "checkpoints")
        except InputError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    folder, refusal = found
    if refusal:
        raise InputError(refusal)
    return 0 if folder is None else training_state.restore(engine, folder)


def write_model_folder(output: Path, config: PretrainedConfig, shards: ShardSet) -> None:
    """Write the folder model/ with configuration and tokenizers, so that an export needs neither
    the shards nor a network.
    """
    folder = output / "model"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _CONFIG, config.to_json_string())
    for name in shards.manifest.tokenizer_folders:
        copy_folder(shards.fetch(name), folder / name)


def classes_so_far(output: Path) -> dict[str, list[str]]:
    """The classes that the run in a folder has been trained on so far, by task."""
    path = output / "model" / _CONFIG
    config = read_json(path) if saved_steps(output) and path.is_file() else {}
    return dict(config.get("classes") or {})


def export(
    checkpoint: Path,
    out: Path,
    threshold_from: str | None = None,
    device: Device | None = None,
    mean_with: Sequence[str] = (),
    images: Path | None = None,
) -> int:
    """Write the model of a checkpoint as one folder for `from_pretrained`; returns the number of
    completed steps.

    checkpoint: a run's output folder (its newest checkpoint), or one step's folder in it. out: may
    hold an earlier export, which is replaced. Weights keep the precision of the training.
    threshold_from: training shards on which the threshold of masks that are written in one pass,
    and how their outlines follow the edges of images, are fitted, on `device` (by default a GPU
    where there is one). images: the folder of their images, by default the one that they were
    built from. mean_with: exported models whose weights are averaged with those of the
    checkpoint, see mean_weights.py. Raises InputError where there is no checkpoint, or one that
    cannot be read, where there is no such device, where a model does not fit the checkpoint, and
    where `out` cannot be written or holds anything else.
    """
    out, place = output_folder(out).resolve(), find_device(device)
    _check_free(out)
    folder = _find(checkpoint)
    run = folder.parent.parent
    if not (run / "model" / _CONFIG).is_file():
        raise InputError(
            f"{run} lacks model/config.json, which training writes beside its checkpoints."
        )
    if out == (run / "model").resolve():
        raise InputError(f"{out} is a part of the run; give --out another folder.")
    config = DecoderConfig.from_pretrained(run / "model")
    weights, step = training_state.read_weights(folder, config)
    trained = how_it_was_trained(run, step)
    if others := [OtherModel(source) for source in mean_with]:
        for other in others:
            other.check(config)
        weights = mean_weights(weights, (other.weights for other in others))
        config.classes = joined_classes([config.classes or {}, *(o.classes for o in others)])
        if trained is not None:
            trained["mean_with"] = [other.record() for other in others]
    with torch.device("meta"):
        model = InContextDecoder(config)
    model.load_state_dict(weights, assign=True)
    with _replacing_export(out) as temporary:
        copy_folder(run / "model", temporary)
        model.save_pretrained(temporary)
        for path in temporary.glob("*.safetensors"):
            give_usual_mode(path)
        if trained is not None:
            write_whole(temporary / TRAINING, json.dumps(trained, indent=2) + "\n")
            write_whole(temporary / CARD, model_card(config.to_dict(), trained))
        if threshold_from is not None:
            fitted = InContextModel.from_pretrained(temporary, place)
            config.mask_threshold, config.mask_edges = fit_masks(
                fitted, ShardSet(threshold_from), images=images
            )
            config.save_pretrained(temporary)
    return step


def _check_free(out: Path) -> None:
    """Raise InputError where a folder holds anything but an export, which a new one replaces."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {_CONFIG, CARD, TRAINING, _PARTIAL, *TOKENIZER_FOLDERS}
    others = sorted(name for name in names - ours if not _WEIGHTS.fullmatch(name))
    if not others and names and _PARTIAL not in names and not _is_export(out):
        others = sorted(names)
    if others:
        raise InputError(
            f"{out} holds other files ({', '.join(others[:3])}); give --out a new folder, or one "
            "of an earlier export."
        )


def _is_export(folder: Path) -> bool:
    with contextlib.suppress(InputError):
        config = read_json(folder / _CONFIG)
        return isinstance(config, dict) and config.get("model_type") == DecoderConfig.model_type
    return False


@contextlib.contextmanager
def _replacing_export(out: Path) -> Iterator[Path]:
    """Gives a folder within `out` to write an export into, whose files then replace those of an
    earlier one. `out` itself stays: it may be a mount point.
    """
    temporary, is_new = out / _PARTIAL, not out.exists()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        for old in out.iterdir():
            if old.is_dir() and not old.is_symlink():
                if old != temporary:
                    shutil.rmtree(old)
            else:
                old.unlink()
        # The configuration comes last: without it, no reader takes the folder for a model.
        for new in sorted(temporary.iterdir(), key=lambda path: path.name == _CONFIG):
            new.rename(out / new.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # It stays if the export was written.


def whole_checkpoints(output: Path) -> list[Path]:
    """The folders of a run's complete checkpoints, the oldest first."""
    return [folder for folder in _all(output / "checkpoints") if _damage(folder) is None]


def _find(checkpoint: Path) -> Path:
    if checkpoint.name.startswith("step-") and checkpoint.is_dir():
        damage = _damage(checkpoint)
        if damage:
            raise InputError(f"The checkpoint {checkpoint} is damaged: {damage}.")
        return checkpoint
    for base in (checkpoint, checkpoint / "checkpoints"):
        newest = _newest_whole(base)
        if newest is not None:
            return newest
    raise InputError(
        f"{checkpoint} holds no checkpoint; give a run's output folder, or a step-... folder in "
        "its checkpoints."
    )


def _newest_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if the folder has no checkpoints."""
    damages: dict[str, str] = {}
    for candidate in reversed(_all(folder)):
        damage = _damage(candidate)
        if damage is None:
            if damages:
                newer = "; ".join(f"{name} is damaged: {what}" for name, what in damages.items())
                say(f"warning: {newer}; {candidate} is used.")
            return candidate
        damages[str(candidate)] = damage
    finished = {name: what for name, what in damages.items() if what != _UNFINISHED}
    if finished:
        name, what = next(iter(finished.items()))
        raise InputError(
            f"The checkpoint {name} is damaged: {what}; remove it to start from the "
            "beginning, or restore the file."
        )
    return None


_UNFINISHED = "its saving was interrupted"


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, sorted by their steps; copies under other names
    are ignored.
    """
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by their sizes; None if all are right."""
    try:
        content = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        files = [(folder / Path(name).name, size) for name, size in content["files"].items()]
    except FileNotFoundError:
        return _UNFINISHED
    except OSError as error:
        return f"its file {_COMPLETE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its file {_COMPLETE} is not valid"
    for path, size in files:
        if not path.is_file():
            return f"its file {path.name} is missing"
        if path.stat().st_size != size:
            return f"its file {path.name} has {path.stat().st_size} bytes of {size}"
    return None


def _make_room(folder: Path, needed: int) -> None:
    """Remove the files of an interrupted save, and a damaged checkpoint of the same step.

    Raises OSError if the disk has no room for `needed` bytes.
    """
    checkpoints = folder.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    for old in _all(checkpoints):
        if old != folder and _damage(old) == _UNFINISHED:
            shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    free = shutil.disk_usage(checkpoints).free
    if free < needed:
        raise OSError(f"{free >> 20} MiB are free, {needed >> 20} MiB are needed")


def _complete(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    write_whole(folder / _COMPLETE, json.dumps({"files": files}, indent=1) + "\n")
    for path in (folder / _COMPLETE, folder, folder.parent):
        flush_to_disk(path)


def _retain(checkpoints: Path, saved: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, among which `saved` always is, and
    damaged ones that are older than it. A newer damaged one is kept until a save replaces it,
    because its files may be restored.
    """
    folders = _all(checkpoints)
    whole = [folder for folder in folders if folder == saved or _damage(folder) is None]
    kept = {*whole[-keep:], *folders[folders.index(saved) :]}
    for old in folders:
        if old not in kept:
            try:
                shutil.rmtree(old)
            except OSError as error:
                say(f"warning: {old} cannot be removed ({error.strerror}).")
