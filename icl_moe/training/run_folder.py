"""The folder of a run, training.output: only one run at a time writes into it, only the run that
began in it may continue there, and run.json records what each part of the run was computed with.
"""

import contextlib
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.locks import locked
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import to_dict
from icl_moe.versions import installed_versions

if TYPE_CHECKING:
    # This imports DeepSpeed, and a refusal must not wait for that.
    from icl_moe.training.distributed import Place

_FILE = "run.json"

_CHECKPOINTS = "checkpoints/step-*/complete.json"

_PACKAGES = ("icl-moe", "torch", "deepspeed", "transformers", "webdataset", "numpy")

_SAME = ("init_from", "seed", "global_batch", "sampling", "task_weights")
"""Settings of `training` that decide, with the shards, where a run starts and which samples a step
takes.
"""


_PATHS = {"data": ("shards", "validation", "cache"), "training": ("output", "init_from")}
"""The settings of a recipe that name places on a machine, by section."""


def saved_steps(output: Path) -> int:
    """The steps of the newest checkpoint in a run's folder, 0 if there is none."""
    names = (file.parent.name.removeprefix("step-") for file in output.glob(_CHECKPOINTS))
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_same_run(recipe: TrainingRecipe, shards: ShardSet) -> None:
    """Raise InputError, naming the differences, if the run in training.output has checkpoints and
    started from another model, or takes other samples, than this recipe would.
    """
    output = Path(recipe.training.output)
    saved = saved_steps(output)
    trained = [stretch for stretch in _read(output) if stretch["from_step"] < saved]
    if not trained:
        return
    last = trained[-1]
    differences = [
        (f"training.{name}", last["recipe"]["training"].get(name), getattr(recipe.training, name))
        for name in _SAME
    ]
    differences.append(
        (
            "the sha256 of the shards' manifest",
            last["shards"]["manifest_sha256"],
            shards.fingerprint,
        )
    )
    named = [
        f"{name} is {was} there and {now} here" for name, was, now in differences if was != now
    ]
    if named and not recipe.training.accept_changes:
        raise InputError(
            f"training.output: {output} holds another run ({'; '.join(named)}); make "
            "them equal, set training.output to a new folder, or training.accept_changes=true to "
            "continue anyway."
        )


@contextlib.contextmanager
def alone_in(output: Path, place: "Place") -> Iterator[None]:
    """Within this context no other run writes into `output`. All ranks must enter it together; rank
    0 holds the lock. Raises InputError on every rank if another run has it.
    """
    with contextlib.ExitStack() as stack:
        refusal: list[str | None] = [None]
        if place.is_main:
            try:
                stack.enter_context(locked(output, "training.output"))
            except InputError as error:
                refusal[0] = str(error)
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise InputError(refusal[0])
        yield


def record_stretch(
    output: Path,
    recipe: TrainingRecipe,
    shards: ShardSet,
    engine_config: dict[str, Any],
    place: "Place",
    start: int,
    initial_model: dict[str, str] | None = None,
) -> None:
    """Write into run.json everything that decides what is computed after step `start`.

    initial_model: the model from whose weights the run started; by default the model of the earlier
    stretches. Earlier stretches are kept if any of their steps remains.
    """
    earlier = [known for known in _read(output) if known["from_step"] < start]
    if initial_model is None and earlier:
        initial_model = earlier[-1].get("initial_model")
    stretch = {
        "from_step": start,
        "recipe": to_dict(recipe),
        "engine": engine_config,
        "shards": {"folder": shards.location, "manifest_sha256": shards.fingerprint},
        "initial_model": initial_model,
        "revision": _git_revision(),
        "versions": installed_versions(_PACKAGES),
        "ranks": place.world,
        "device": torch.cuda.get_device_name(place.device)
        if place.device.type == "cuda"
        else platform.processor() or platform.machine(),
    }
    content = json.dumps(stretch | {"earlier": earlier}, indent=2)
    write_whole(output / _FILE, content + "\n")


def how_it_was_trained(output: Path, steps: int) -> dict[str, Any] | None:
    """The record of how the run in a folder was trained up to its `steps`-th step, for an exported
    model: the last stretch of run.json, without paths of this machine. None if the folder has no
    run.json. Raises InputError if it cannot be read.
    """
    stretches = [stretch for stretch in _read(output) if stretch["from_step"] < steps]
    if not stretches:
        return None
    last = stretches[-1]
    recipe = last["recipe"]
    for section, names in _PATHS.items():
        for name in names:
            recipe[section].pop(name, None)
    if isinstance(recipe.get("engine"), str):  # Its content is in the record.
        recipe["engine"] = Path(recipe["engine"]).name
    last["shards"].pop("folder", None)
    return {"steps": steps, "stretches": len(stretches), **last}


def _read(output: Path) -> list[dict[str, Any]]:
    """The stretches of the run in a folder, in order; an empty list if it has no run.json."""
    path = output / _FILE
    if not path.is_file():
        return []
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        stretches = [*last.pop("earlier", []), last]
        for stretch in stretches:
            # An earlier version kept only the last stretch, without its first step.
            stretch.setdefault("from_step", 0)
            stretch["recipe"]["training"], stretch["shards"]["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"training.output: {path} cannot be read ({error}); restore it, or remove it to "
            "continue without a record of what was trained before."
        ) from error
    return stretches


def _git_revision() -> str | None:
    """The commit of this code, with a + if files differ from it; None outside a checkout, such as
    in a virtual environment that lies in another project's.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=40", "--dirty=+", "--match=")
    except (OSError, subprocess.SubprocessError):
        return None
