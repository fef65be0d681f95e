"""The internals of DeepSpeed that this project uses behave as the adapter says. A version of
DeepSpeed that changes one of them fails here.
"""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe import mappings
from deepspeed.moe.utils import is_moe_param
from torch import distributed as dist
from toy_model import MANIFEST, make_batch, make_recipe

from icl_moe import deepspeed_internals as internals
from icl_moe.data.schedule import RankSlice
from icl_moe.recipe import ParallelSettings
from icl_moe.training.engine import TrainingEngine

# ZeRO stage, bf16, ep_size.
CASES = [(0, True, 1), (1, False, 2), (2, True, 1), (3, False, 1)]


def find(place: Any, output: Path, stage: int, bf16: bool, ep_size: int) -> dict[str, Any]:
    """What the adapter reports about a new engine on this rank, and about the same engine after a
    step.
    """
    recipe = replace(make_recipe(), parallel=ParallelSettings(ep_size, 1))
    part = RankSlice.of(place.rank, 2, recipe.training.global_batch, 1)
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "tensorboard": {"enabled": True, "output_path": str(output), "job_name": "curves"},
    }
    engine = TrainingEngine(recipe, MANIFEST, config, part, place)
    found = {
        "ranges": ranges(engine.deepspeed),
        "groups": groups(engine.model),
        "whole": whole_parameters(engine.model),
    }
    for micro_step in range(part.micro_steps):
        batch = make_batch("segmentation", 1, seed=2 * micro_step + part.rank)
        engine.backward(batch, noise=(0, 0))
        engine.step()
    found["norms"] = engine.norm, engine.deepspeed.get_global_grad_norm()
    found["doubled"] = double(engine)
    internals.set_completed_steps(engine.deepspeed, 7, skipped=2)
    found["counters"] = internals.counters(engine.deepspeed)
    writer = internals.tensorboard_writer(engine.deepspeed)
    found["writes pictures"] = writer is not None and callable(writer.add_image)
    engine.deepspeed.destroy()
    return found


def ranges(engine: Any) -> dict[str, tuple[int, torch.Tensor]]:
    """Parameter -> the start of the range that this rank optimizes, and its master weights."""
    masters = internals.master_weights(engine)
    found = {}
    for name, parameter in engine.module.named_parameters():
        start, length, master, offset = internals.optimized_range(engine, parameter, masters)
        found[name] = start, master.detach().view(-1)[offset : offset + length].float().clone()
    return found


def groups(model: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ranks over which experts are spread, and those that hold copies of them."""
    return {
        (
            tuple(dist.get_process_group_ranks(internals.expert_parallel_group(parameter))),
            tuple(dist.get_process_group_ranks(internals.expert_data_parallel_group(parameter))),
        )
        for parameter in model.parameters()
        if is_moe_param(parameter)
    }


def whole_parameters(model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    partitioned = any(map(internals.is_partitioned, parameters.values()))
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned):
        whole = {name: p.detach().float().clone() for name, p in parameters.items()}
    assert all(whole[name].shape == internals.whole_shape(p) for name, p in parameters.items())
    return whole


@torch.no_grad()
def double(engine: TrainingEngine) -> bool:
    """Double the master weights. Returns whether the model then computes with them."""
    before = whole_parameters(engine.model)
    masters = internals.master_weights(engine.deepspeed)
    parameters = list(engine.model.parameters())
    tensors = {
        id(held.master): held.master
        for p in parameters
        if (held := internals.optimized_range(engine.deepspeed, p, masters)).length
    }
    for master in tensors.values():
        master.mul_(2.0)
    internals.copy_masters_into_model(engine.deepspeed)
    after = whole_parameters(engine.model)
    return all(torch.allclose(after[name], 2 * before[name], rtol=2e-2) for name in before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_adapter_finds_what_the_engine_keeps(rank_group, tmp_path, case):
    stage, _, ep_size = case
    first, second = rank_group(2).run(find, tmp_path, *case)
    for found in (first, second):
        assert found["norms"][0] == pytest.approx(float(found["norms"][1]), rel=1e-6)
        assert found["doubled"]
        assert found["counters"] == {
            "micro_steps": 14,
            "global_steps": 7,
            "global_samples": 28,
            "skipped_steps": 2,
        }
        assert len(found["groups"]) == (0 if stage == 3 else 1)
    assert (first["writes pictures"], second["writes pictures"]) == (True, False)
    if stage < 3:
        spread, copies = next(iter(first["groups"]))
        assert (spread, copies) == (((0, 1), (0,)) if ep_size == 2 else ((0,), (0, 1)))
    for name, whole in first["whole"].items():
        for found in (first, second):
            mine = whole if found is first else second["whole"][name]
            start, masters = found["ranges"][name]
            assert torch.allclose(mine.view(-1)[start:][: len(masters)], masters, rtol=1e-2)
        lengths = [len(found["ranges"][name][1]) for found in (first, second)]
        copied = stage == 0 or (ep_size == 2 and "deepspeed_experts" in name)
        assert sum(lengths) == whole.numel() * (2 if copied else 1), name


def test_functions_that_are_replaced_are_there_and_are_used():
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    tree = ast.parse(Path(mappings.__file__).read_text())
    called = {node.func.id for node in ast.walk(tree) if is_plain_call(node)}
    assert "_gather_tokens" in called


def is_plain_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def test_nothing_else_of_the_project_touches_the_internals(repository):
    names = (
        "_global_grad_norm",
        "_hp_mapping",
        "ds_id",
        "ds_shape",
        "fp32_partitioned_groups_flat",
        "fp32_groups",
        "_get_expert_",
        "groups.mpu",
        "tb_monitor",
        "__compatible_ops__",
    )
    for path in (repository / "icl_moe").rglob("*.py"):
        if path.name != "deepspeed_internals.py":
            text = path.read_text(encoding="utf-8")
            assert not [name for name in names if name in text], path
