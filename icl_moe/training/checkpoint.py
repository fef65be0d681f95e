"""Checkpoints of a run, and the exported model that inference reads.

A run's output folder holds run.json, model/ (what an exported model needs besides weights) and
checkpoints/, a folder a step. In it are the files of training_state.py and, written last,
complete.json. DeepSpeed's own files are not among them: they can only be resumed in the layout that
wrote them, and would hold the same numbers again.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import PretrainedConfig

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.outputs import output_folder
from icl_moe.training import training_state
from icl_moe.training.faults import any_rank

_TAG = "step-{:08d}"
_COMPLETE = "complete.json"
"""Written into a checkpoint's folder last: its files and their sizes. Without it, or where they
differ, the checkpoint is not whole.
"""


def save(engine: Any, output: Path, step: int, keep: int) -> bool:
    """Save the whole training state after `step` steps, then remove all but the newest `keep`
    checkpoints. Every rank calls it.

    output: a folder that all ranks see. Where its disk has no room, rank 0 says so, and the answer
    is False: training goes on and tries again later.
    """
    checkpoints = output / "checkpoints"
    folder = checkpoints / _TAG.format(step)
    is_main = dist.get_rank() == 0
    if is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for old in checkpoints.glob("step-*"):
            # What an interrupted save left behind, or a damaged checkpoint of this very step.
            if old == folder or not (old / _COMPLETE).is_file():
                shutil.rmtree(old)
    if not _has_room(engine, checkpoints):
        return False
    if not training_state.write(engine, folder, step):
        if is_main:
            _say(
                f"no checkpoint is saved in {checkpoints}: its files cannot all be written; "
                "training goes on."
            )
        return False
    if is_main:
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        write_whole(folder / _COMPLETE, json.dumps({"files": files}, indent=1) + "\n")
        for old in sorted(checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    return True


def resume(engine: Any, output: Path) -> int:
    """Load the newest whole checkpoint of a run and return its number of completed steps; 0 where
    there is none. Every rank calls it.

    The layout may be another than the one that saved. A damaged checkpoint is named, and the one
    before it is used. Raises InputError where all are damaged, and for one of another model or
    optimizer.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:  # It alone looks at the size of every file.
        try:
            found[0] = _newest_whole(output / "checkpoints")
        except InputError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    folder, refusal = found
    if refusal:
        raise InputError(refusal)
    return 0 if folder is None else training_state.read(engine, folder)


def write_model_folder(output: Path, config: PretrainedConfig, shards: ShardSet) -> None:
    """Write model/: configuration and both tokenizers, so that an export needs neither shards nor
    network.
    """
    folder = output / "model"
    config.save_pretrained(folder)
    for name in ("image_tokenizer", "text_tokenizer"):
        shutil.copytree(shards.fetch(name), folder / name, dirs_exist_ok=True)


def export(checkpoint: Path, out: Path) -> int:
    """Write the model of a checkpoint as one folder for `from_pretrained`; returns the number of
    completed steps.

    checkpoint: a run's output folder (its newest checkpoint), or one step's folder in it. Weights
    keep the precision that they trained in. Raises InputError where there is no checkpoint, or one
    that cannot be read, and where `out` cannot be written.
    """
    out = output_folder(out)
    folder = _find(checkpoint)
    run = folder.parent.parent
    if not (run / "model" / "config.json").is_file():
        raise InputError(
            f"{run} lacks model/config.json, which training writes beside its checkpoints."
        )
    config = DecoderConfig.from_pretrained(run / "model")
    weights, step = training_state.read_weights(folder, config)
    with torch.device("meta"):
        model = InContextDecoder(config)
    model.load_state_dict(weights, assign=True)
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise InputError(
            f"{out} holds other files; give --out a new folder, or one of an earlier export."
        )
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run / "model", temporary)
    model.save_pretrained(temporary)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
    return step


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
    """The newest checkpoint in a folder that is whole; None where the folder has none at all."""
    damages: dict[str, str] = {}
    for candidate in sorted(
        (path for path in folder.glob("step-*") if path.is_dir()), reverse=True
    ):
        damage = _damage(candidate)
        if damage is None:
            if damages:
                newer = "; ".join(f"{name} is damaged: {what}" for name, what in damages.items())
                _say(f"warning: {newer}; {candidate} is used.")
            return candidate
        damages[str(candidate)] = damage
    finished = {name: what for name, what in damages.items() if what != _UNFINISHED}
    if finished:
        name, what = next(iter(finished.items()))
        raise InputError(
            f"The checkpoint {name} is damaged: {what}; remove it to start anew, or put the file "
            "back."
        )
    return None


_UNFINISHED = "its saving was interrupted"


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes; None where they are all there."""
    try:
        files = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return _UNFINISHED
    for name, size in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes of {size}"
    return None


def _has_room(engine: Any, folder: Path) -> bool:
    """Whether the disk of `folder` can take one more checkpoint, as rank 0 sees it; the same answer
    on every rank.
    """
    needed = torch.tensor(training_state.size(engine), device=engine.device)
    dist.all_reduce(needed)
    is_short = False
    if dist.get_rank() == 0:
        free = shutil.disk_usage(folder).free
        is_short = free < needed.item()
        if is_short:
            room = f"{free >> 20} MiB are free, {int(needed) >> 20} MiB are needed"
            _say(f"no checkpoint is saved in {folder}: {room}; training goes on.")
    return not any_rank([is_short], engine.device)[0]


def _say(what: str) -> None:
    print(f"icl-moe: {what}", file=sys.stderr)
