"""Checkpoints of a run, and the exported model that inference reads.

A run's output folder holds run.json, model/ (what an exported model needs besides weights) and checkpoints/ (DeepSpeed's own).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from torch import Tensor
from torch import distributed as dist
from transformers import PretrainedConfig

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.moe import exported_name

_TAG = "step-{:08d}"
_COMPLETE = "complete.json"
"""Written into a checkpoint's folder last: how it was spread, its files and their sizes. Without it, or where they differ, the
checkpoint is not whole."""


def save(engine: Any, output: Path, step: int, keep: int) -> bool:
    """Save the whole training state after `step` steps, then remove all but the newest `keep` checkpoints. Every rank calls it.

    Where the disk has no room, nothing is written, rank 0 says so, and the answer is False: training goes on and tries again later.
    """
    folder = output / "checkpoints"
    is_main = dist.get_rank() == 0
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("step-*"):
            if not (leftover / _COMPLETE).is_file():
                shutil.rmtree(leftover)  # What an interrupted save left behind.
    if not _has_room(engine, folder):
        return False
    tag = _TAG.format(step)
    engine.save_checkpoint(str(folder), tag=tag, client_state={"completed_steps": step})
    dist.barrier()  # Only then have all ranks written their parts.
    if is_main:
        files = {path.name: path.stat().st_size for path in (folder / tag).iterdir()}
        write_whole(folder / tag / _COMPLETE, json.dumps({"layout": _layout(engine), "files": files}, indent=1) + "\n")
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    return True


def resume(engine: Any, output: Path) -> int:
    """Load the newest whole checkpoint of a run and return its number of completed steps; 0 where there is none.

    A damaged one is named, and the one before it is used. Raises InputError where all are damaged, or of another model.
    """
    folder = _newest_whole(output / "checkpoints", warn=dist.get_rank() == 0)
    if folder is None:
        return 0
    then, now = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))["layout"], _layout(engine)
    if then != now:
        differences = ", ".join(f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name])
        raise InputError(f"The checkpoint {folder} is spread in another way ({differences}); go on as it was saved.")
    try:
        _, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except RuntimeError as error:
        raise InputError(
            f"The checkpoint {folder} is of another model than the recipe's ({_first_line(error)}); "
            "set training.output to a new folder, or make the recipe equal."
        ) from error
    return int(state["completed_steps"])


def write_model_folder(output: Path, config: PretrainedConfig, shards: ShardSet) -> None:
    """Write model/: configuration and both tokenizers, so that an export needs neither shards nor network."""
    folder = output / "model"
    config.save_pretrained(folder)
    for name in ("image_tokenizer", "text_tokenizer"):
        shutil.copytree(shards.folder / name, folder / name, dirs_exist_ok=True)


def export(checkpoint: Path, out: Path) -> int:
    """Write the model of a checkpoint as one folder for `from_pretrained`; returns the number of completed steps.

    checkpoint: a run's output folder (its newest checkpoint), or one step's folder in it. Weights keep the precision that they
    trained in. Raises InputError where there is no checkpoint, or one that cannot be read.
    """
    folder = _find(checkpoint)
    run = folder.parent.parent
    if not (run / "model" / "config.json").is_file():
        raise InputError(f"{run} lacks model/config.json, which training writes beside its checkpoints.")
    weights, step = _read_weights(folder)
    config = DecoderConfig.from_pretrained(run / "model")
    with torch.device("meta"):
        model = InContextDecoder(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(f"The weights in {folder} are not those of {run / 'model' / 'config.json'}: {_first_line(error)}.") from error
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise InputError(f"{out} holds other files; give --out a new folder, or one of an earlier export.")
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
        newest = _newest_whole(base, warn=True)
        if newest is not None:
            return newest
    raise InputError(f"{checkpoint} holds no checkpoint; give a run's output folder, or a step-... folder in its checkpoints.")


def _newest_whole(folder: Path, warn: bool) -> Path | None:
    """The newest checkpoint in a folder that is whole; None where the folder has none at all."""
    damages: dict[str, str] = {}
    for candidate in sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True):
        damage = _damage(candidate)
        if damage is None:
            if damages and warn:
                newer = "; ".join(f"{name} is damaged: {what}" for name, what in damages.items())
                print(f"icl-moe: warning: {newer}; {candidate} is used.", file=sys.stderr)
            return candidate
        damages[str(candidate)] = damage
    finished = {name: what for name, what in damages.items() if what != _UNFINISHED}
    if finished:
        name, what = next(iter(finished.items()))
        raise InputError(f"The checkpoint {name} is damaged: {what}; remove it to start anew, or put the file back.")
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


def _layout(engine: Any) -> dict[str, Any]:
    """What the optimizer's state in a checkpoint depends on: DeepSpeed cannot spread it anew."""
    return {"ranks": dist.get_world_size(), "ep_size": _ep_size(engine), "optimizer partitioned": bool(engine.zero_optimization())}


def _ep_size(engine: Any) -> int:
    return max((module.ep_size for module in engine.module.modules() if isinstance(module, MoE)), default=1)


def _has_room(engine: Any, folder: Path) -> bool:
    """Whether the disk of `folder` can take one more checkpoint, as rank 0 sees it; the same answer on every rank."""
    sizes = [p.numel() * (_ep_size(engine) if is_moe_param(p) else 1) for p in engine.module.parameters()]
    needed = 16 * sum(sizes)  # Bytes of weights, master weights and two moments, all in float32.
    answer = torch.tensor([1.0], device=engine.device)
    if dist.get_rank() == 0:
        free = shutil.disk_usage(folder).free
        if free < needed:
            answer.zero_()
            room = f"{free >> 20} MiB are free, {needed >> 20} MiB may be needed"
            print(f"icl-moe: no checkpoint is saved in {folder}: {room}; training goes on.", file=sys.stderr)
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Every weight by its exported name, from DeepSpeed's files: one of the dense part, one an expert."""
    main = _load(folder / "mp_rank_00_model_states.pt")
    weights = {exported_name(name): tensor for name, tensor in main["module"].items()}
    for path in sorted(folder.glob("layer_*_expert_*_mp_rank_00_model_states.pt")):
        weights |= {exported_name(name): tensor for name, tensor in _load(path).items()}
    return weights, int(main["completed_steps"])


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"The checkpoint lacks its file {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file raises one of many kinds.
        raise InputError(f"The checkpoint file {path} cannot be read ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
