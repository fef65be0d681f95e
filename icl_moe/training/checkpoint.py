"""Checkpoints of a run, and the exported model that inference reads.

A run's output folder holds recipe.json, model/ (what an exported model needs besides weights) and checkpoints/ (DeepSpeed's own).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PretrainedConfig

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.moe import exported_name

_TAG = "step-{:08d}"


def save(engine: Any, output: Path, step: int, keep: int) -> None:
    """Save the whole training state after `step` steps, then remove all but the newest `keep` checkpoints. Every rank calls it."""
    folder = output / "checkpoints"
    engine.save_checkpoint(str(folder), tag=_TAG.format(step), client_state={"completed_steps": step})
    dist.barrier()  # Only then is the new one whole.
    if dist.get_rank() == 0:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)


def resume(engine: Any, output: Path) -> int:
    """Load the newest checkpoint of a run and return its number of completed steps; 0 where there is none."""
    folder = output / "checkpoints"
    if not (folder / "latest").is_file():
        return 0
    try:
        path, state = engine.load_checkpoint(str(folder))
    except RuntimeError as error:
        raise InputError(
            f"The checkpoint in {folder} is of another model than the recipe's ({_first_line(error)}); "
            "set training.output to a new folder, or make the recipe equal."
        ) from error
    if path is None:
        raise InputError(f"{folder / 'latest'} names a checkpoint that is not there; remove that file to start anew.")
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
    for base in (checkpoint, checkpoint / "checkpoints"):
        if (base / "latest").is_file():
            return base / (base / "latest").read_text(encoding="utf-8").strip()
    if checkpoint.name.startswith("step-") and checkpoint.is_dir():
        return checkpoint
    raise InputError(f"{checkpoint} holds no checkpoint; give a run's output folder, or a step-... folder in its checkpoints.")


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
