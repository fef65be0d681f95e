"""The training state in files that do not depend on the layout that wrote them: DeepSpeed has no
such form for models with experts.

The state is every parameter's float32 master weight and the optimizer's state of it (moments, and
counts of steps), under the name that the parameter has in an exported model, where an expert has
its global id. Everything else is a function of the step.

    index.json                     steps, and how many of them were skipped; optimizer, precision;
    of each parameter its shape, its counts, and which rank wrote which range
    weight-RRRRR.safetensors       the ranges of master weights that rank R wrote, flattened, by
    parameter
    exp_avg-RRRRR.safetensors      the same ranges of an optimizer state; a file for each state that
    the optimizer has

Under ZeRO a rank writes what its partitions hold; at stage 0 the ranks that hold equal copies write
equal shares. So D data-parallel ranks write, under AdamW, 12 bytes x parameters in all and 1 / D of
it each; nothing is gathered, and on a GPU one state's range at a time is copied to the host. A rank
reads the ranges that its own partitions hold. Only if the number of tensor ranks changes does it
assemble whole parameters, one at a time. The weights that a bf16 model computes with are not
stored, because they are the master weights, rounded except for those of gates.

checkpoint.py manages the folders of checkpoints and decides which are complete; partitions.py finds
where DeepSpeed keeps each number.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from icl_moe.deepspeed_internals import set_completed_steps
from icl_moe.errors import InputError
from icl_moe.files import flush_to_disk, give_usual_mode, write_whole
from icl_moe.messages import say
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.router import GATE
from icl_moe.model.tensor_parallel import join, split
from icl_moe.training.faults import any_rank
from icl_moe.training.partitions import (
    HeldRange,
    ep_size,
    held_ranges,
    ranges_to_write,
    refresh_model,
    tensor_place,
)

_SCHEMA = 2  # Version 1 held the moments of MT-AdamW instead of means and weights.
_INDEX = "index.json"
_WEIGHT = "weight"


def write(engine: Any, folder: Path, step: int) -> bool:
    """Write the state after `step` steps into `folder`. Every rank calls it and is told whether
    every rank could write.
    """
    rank, ranges = dist.get_rank(), ranges_to_write(engine)

    def write_tensors() -> None:
        folder.mkdir(exist_ok=True)
        for kind, tensors in _tensors(engine, ranges).items():
            _save(tensors, folder / _file(kind, rank))

    if not attempt(engine, folder, write_tensors):
        return False
    gathered: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(
        [
            (r.name, r.parts, [r.part, r.start, r.length, rank], *_states(engine, r.master))
            for r in ranges
        ],
        gathered,
    )

    def write_index() -> None:
        if gathered is not None:
            write_whole(folder / _INDEX, json.dumps(_index(engine, step, gathered)) + "\n")
            flush_to_disk(folder / _INDEX)

    return attempt(engine, folder, write_index)


def attempt(engine: Any, folder: Path, work: Callable[[], None]) -> bool:
    """Do this rank's part of a save into `folder`; returns whether every rank could do its part.
    Ranks that could not report the reason.
    """
    failed = False
    try:
        work()
    except (OSError, SafetensorError) as error:
        rank = dist.get_rank()
        say(f"no checkpoint is saved in {folder.parent}: {error} (rank {rank}).")
        failed = True
    return not any_rank([failed], engine.device)[0]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    give_usual_mode(path)
    flush_to_disk(path)


def size(engine: Any) -> int:
    """The bytes of numbers that this rank would write."""
    return sum(
        t.numel() * t.element_size()
        for tensors in _tensors(engine, ranges_to_write(engine)).values()
        for t in tensors.values()
    )


@torch.no_grad()
def restore(engine: Any, folder: Path) -> int:
    """Load the state in `folder` into a new engine of any layout; returns its number of steps.
    Every rank calls it.

    Raises InputError for the state of another model or optimizer, and for files that cannot be
    read.
    """
    stored = _Stored(folder)
    _check_fits(stored, engine, folder)
    by_master: dict[int, list[HeldRange]] = defaultdict(list)
    for held in held_ranges(engine):
        by_master[id(held.master)].append(held)
    for ranges in by_master.values():
        master = ranges[0].master
        kinds, counts = stored.states(ranges)
        _fill(master, ranges, _WEIGHT, stored)
        state = {kind: _fill(torch.zeros_like(master), ranges, kind, stored) for kind in kinds}
        state |= {
            kind: _count(engine.basic_optimizer, kind, count, master.device)
            for kind, count in counts.items()
        }
        engine.basic_optimizer.state[master] = state
    refresh_model(engine)
    steps = int(stored.index["completed_steps"])
    # Earlier versions did not write how many steps were skipped.
    set_completed_steps(engine, steps, int(stored.index.get("skipped_steps", 0)))
    return steps


def read_weights(folder: Path, config: DecoderConfig) -> tuple[dict[str, Tensor], int]:
    """Every weight by its exported name, in the precision that it was computed with, and the number
    of steps.
    """
    stored = _Stored(folder)
    shapes = _shapes(config)
    difference = stored.difference(shapes)
    if difference:
        raise InputError(
            f"The checkpoint {folder} is not of the model in the model/config.json of its run: "
            f"{difference}."
        )
    precision = getattr(torch, stored.index["precision"])
    weights = {
        name: stored.whole(name, _WEIGHT).to(torch.float32 if re.search(GATE, name) else precision)
        for name in shapes
    }
    return weights, int(stored.index["completed_steps"])


class _Stored:
    """A written state that is read by ranges: each file is opened once, and only the requested
    parts of it are read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[Path, Any] = {}
        try:
            self.index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"The checkpoint {folder} has no readable {_INDEX}; it was written by another "
                "version."
            ) from error
        if self.index["schema"] != _SCHEMA:
            raise InputError(
                f"{folder / _INDEX} has schema {self.index['schema']}, and this version reads "
                f"schema {_SCHEMA}."
            )
        self._parameters: dict[str, dict[str, Any]] = self.index["parameters"]

    def difference(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """The first difference between the stored parameters and `shapes`; None if they agree."""
        there = {name: tuple(entry["shape"]) for name, entry in self._parameters.items()}
        for name in sorted(there.keys() | shapes.keys()):
            if there.get(name) != shapes.get(name):
                was, now = (
                    f"has the shape {list(found[name])}" if name in found else "is missing"
                    for found in (there, shapes)
                )
                return f"{name} {was} there and {now} here"
        return None

    def states(self, ranges: list[HeldRange]) -> tuple[list[str], dict[str, float]]:
        """The optimizer's states of parameters that share a master tensor: kinds that have its
        shape, and counts by kind.
        """
        found = [
            (self._parameters[r.name]["states"], self._parameters[r.name]["counts"]) for r in ranges
        ]
        if any(states != found[0] for states in found):
            raise InputError(
                f"In the checkpoint {self._folder}, {ranges[0].name} and others took different "
                "numbers of optimizer steps; "
                "resume at ZeRO stage 0, which keeps a number for each."
            )
        return found[0]

    def flat(self, held: HeldRange, kind: str) -> Tensor:
        """The numbers of a range (length,), for any ranges and parts in which they were written."""
        if self._parameters[held.name]["parts"] == held.parts:
            return self._flat(held.name, kind, held.part, held.start, held.length)
        part = split(held.name, self.whole(held.name, kind), held.part, held.parts)
        return part.reshape(-1)[held.start : held.start + held.length]

    def whole(self, name: str, kind: str) -> Tensor:
        """A whole parameter, or an optimizer state of one."""
        entry = self._parameters[name]
        shape, parts = entry["shape"], range(entry["parts"])
        shapes = [
            split(name, torch.empty(shape, device="meta"), part, len(parts)).shape for part in parts
        ]
        pieces = [
            self._flat(name, kind, part, 0, shapes[part].numel()).view(shapes[part])
            for part in parts
        ]
        return join(name, pieces, shape[0])

    def _flat(self, name: str, kind: str, part: int, start: int, length: int) -> Tensor:
        pieces = []
        for of_part, begin, written, rank in self._parameters[name]["ranges"]:
            first, last = max(start, begin), min(start + length, begin + written)
            if of_part == part and first < last:
                pieces.append(self._read(_file(kind, rank), name, first - begin, last - begin))
        return torch.cat(pieces)

    def _read(self, file: str, name: str, first: int, last: int) -> Tensor:
        path = self._folder / file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            values: Tensor = self._open[path].get_slice(name)[first:last]
        except (OSError, SafetensorError) as error:
            raise InputError(f"The checkpoint file {path} cannot be read ({error}).") from error
        return values


def _check_fits(stored: _Stored, engine: Any, folder: Path) -> None:
    difference = stored.difference(_shapes(engine.module.config))
    if difference:
        raise InputError(
            f"The checkpoint {folder} has another model than the recipe ({difference}); "
            "set training.output to a new folder, or correct the recipe."
        )
    theirs, ours = stored.index["optimizer"], type(engine.basic_optimizer).__name__
    if theirs != ours:
        raise InputError(
            f"The checkpoint {folder} holds the state of {theirs}, but optimizer.name makes "
            f"{ours}; "
            "set optimizer.name as it was, or training.output to a new folder."
        )


def _file(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _index(engine: Any, step: int, gathered: list[list[Any]]) -> dict[str, Any]:
    parameters: dict[str, dict[str, Any]] = {}
    for name, parts, where, states, counts in (entry for entries in gathered for entry in entries):
        entry = parameters.setdefault(
            name, {"parts": parts, "states": states, "counts": counts, "ranges": []}
        )
        entry["ranges"].append(where)
    for name, shape in _shapes(engine.module.config).items():
        parameters[name]["shape"] = shape
        parameters[name]["ranges"].sort()
    _assert_complete(parameters)
    return {
        "schema": _SCHEMA,
        "completed_steps": step,
        "skipped_steps": engine.skipped_steps,
        "optimizer": type(engine.basic_optimizer).__name__,
        "precision": str(next(engine.module.parameters()).dtype).removeprefix("torch."),
        "written_under": {
            "ranks": dist.get_world_size(),
            "ep_size": ep_size(engine),
            "tp_size": tensor_place(engine)[1],
            "zero_stage": engine.zero_optimization_stage(),
        },
        "parameters": parameters,
    }


def _assert_complete(parameters: dict[str, dict[str, Any]]) -> None:
    """Assert that every number was written exactly once: a missing one must not be noticed only
    when the state is needed.
    """
    for name, entry in parameters.items():
        for part in range(entry["parts"]):
            end = 0
            for _, start, length, _ in (where for where in entry["ranges"] if where[0] == part):
                assert start == end, f"{name}: a range begins at {start}, not {end}"
                end += length
            expected = split(
                name, torch.empty(entry["shape"], device="meta"), part, entry["parts"]
            ).numel()
            assert end == expected, f"{name}: {end} of {expected} numbers were written"


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, by its exported name."""
    with torch.device("meta"):
        return {
            name: tuple(parameter.shape)
            for name, parameter in InContextDecoder(config).named_parameters()
        }


def _tensors(engine: Any, ranges: list[HeldRange]) -> dict[str, dict[str, Tensor]]:
    """Kind -> parameter -> the ranges that this rank writes."""
    tensors: dict[str, dict[str, Tensor]] = {_WEIGHT: {r.name: r.of(r.master) for r in ranges}}
    for r in ranges:
        for kind in _states(engine, r.master)[0]:
            tensors.setdefault(kind, {})[r.name] = r.of(
                engine.basic_optimizer.state[r.master][kind]
            )
    return tensors


def _states(engine: Any, master: Tensor) -> tuple[list[str], dict[str, float]]:
    """The optimizer's state of a master tensor: the kinds of states that have its shape, and counts
    by kind.
    """
    state = engine.basic_optimizer.state.get(master, {})
    kinds = [
        kind
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.shape == master.shape
    ]
    return kinds, {
        kind: float(value)
        for kind, value in state.items()
        if kind not in kinds and value is not None
    }


def _fill(tensor: Tensor, ranges: list[HeldRange], kind: str, stored: _Stored) -> Tensor:
    for held in ranges:
        held.of(tensor).copy_(stored.flat(held, kind))
    return tensor


def _count(
    optimizer: torch.optim.Optimizer, kind: str, count: float, device: torch.device
) -> Tensor:
    """A number that an optimizer keeps of a whole tensor: sums of weights in float64; steps, as in
    torch's optimizers, in float32 and on the host, except for those that run entirely on the
    device.
    """
    if kind != "step":
        return torch.tensor(count, dtype=torch.float64)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(count, dtype=torch.float32, device=device if on_device else "cpu")
