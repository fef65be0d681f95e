"""Everything that is touched of DeepSpeed beyond its public interface, each with the reason.

pyproject.toml holds DeepSpeed to one minor version for the sake of these.
tests/distributed/test_deepspeed_internals.py fails where another version changes one of them. The
expert layers, which are subclasses of DeepSpeed's, stand in model/deepspeed_moe.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
from deepspeed.moe import mappings
from deepspeed.utils import groups
from torch import Tensor, nn
from torch import distributed as dist

Engine = Any
"""A deepspeed.DeepSpeedEngine, which has no types."""


# --- Before there is an engine -------------------------------------------------------------------


def leave_out_shared_memory_collective() -> None:
    """DeepSpeed compiles a collective for inference on CPUs when ranks first meet: that takes half
    a minute and a C++ compiler, and no setting turns it off.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_model_parallel_unit(unit: Any) -> None:
    """`deepspeed.initialize(mpu=...)` comes after the expert layers are built, which read the unit
    from there already. An earlier engine of this process may have left its own: None removes it.
    """
    groups.mpu = unit


def tensor_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the other parts of this rank's matrices, by the unit that was set."""
    return groups.mpu.get_tensor_model_parallel_group()


def gather_tokens_by(gather: Callable[..., Tensor]) -> None:
    """Stock expert layers join the tensor ranks' shares with this function, which hands gloo a flat
    output for an N-dimensional input; gloo refuses that.
    """
    mappings._gather_tokens = gather


# --- Experts' groups -----------------------------------------------------------------------------


def expert_parallel_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks over which the experts of the layer of this expert's parameter are spread. There is
    no public way from a parameter to its group.
    """
    return groups._get_expert_parallel_group(_group_name(parameter))


def expert_data_parallel_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold copies of this expert's parameter."""
    return groups._get_expert_data_parallel_group(_group_name(parameter))


def _group_name(parameter: nn.Parameter) -> str:
    """How DeepSpeed tags the parameters of experts."""
    name: str = vars(parameter)["group_name"]
    return name


# --- The engine's optimizer ----------------------------------------------------------------------


class OptimizedRange(NamedTuple):
    """The range of a flattened parameter that this rank optimizes, and where: `length` numbers from
    `start` on are those from `offset` on of the float32 tensor `master`, which the optimizer knows.
    """

    start: int
    length: int
    master: Tensor
    offset: int


def optimized_range(
    engine: Engine, parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]
) -> OptimizedRange:
    """Which range of a parameter this rank optimizes. DeepSpeed has public ways to the whole state
    (`safe_get_full_fp32_param` and its like), which gather it over all ranks, and none to what a
    rank holds.

    masters: what `master_weights` gives.
    """
    optimizer = engine.optimizer
    if is_partitioned(parameter):
        # Stage 3: every rank has a piece of every parameter, the last ones padded.
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * length
        held = max(0, min(length, whole_shape(parameter).numel() - start))
        return OptimizedRange(start, held, optimizer.fp32_partitioned_groups_flat[group], offset)
    if hasattr(parameter, "_hp_mapping"):
        # Stages 1 and 2: a rank has a piece of all parameters of a group, laid end to end.
        mapping = parameter._hp_mapping
        if mapping is None:
            return OptimizedRange(0, 0, parameter, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
        return OptimizedRange(here.start, here.numel, master, there.start)
    return OptimizedRange(0, parameter.numel(), masters.get(parameter, parameter), 0)


def master_weights(engine: Engine) -> dict[nn.Parameter, Tensor]:
    """The master weight of each parameter where there is no ZeRO but bf16, which no public function
    gives; empty otherwise, since parameters are then their own.
    """
    if engine.zero_optimization_stage() or not engine.bfloat16_enabled():
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {
        parameter: master
        for group, masters in pairs
        for parameter, master in zip(group, masters, strict=True)
    }


def copy_masters_into_model(engine: Engine) -> None:
    """Copy the float32 master weights, which somebody has changed, into the weights that the model
    computes with. DeepSpeed does so after each step and after it has read a checkpoint of its own.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    for parameter, master in master_weights(engine).items():
        parameter.copy_(master)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 keeps this parameter in pieces."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> Any:
    """The shape of a parameter, also where stage 3 keeps it in pieces and its own shape is (0,)."""
    return vars(parameter).get("ds_shape", parameter.shape)


# --- The engine's steps --------------------------------------------------------------------------


def norm_of_the_step_at_hand(engine: Engine) -> float | None:
    """The global gradient norm, before clipping, when the optimizer is about to move:
    `engine.get_global_grad_norm()` has it only after the step. None where an overflow left none.
    """
    norm = engine.optimizer._global_grad_norm
    return None if norm is None else float(norm)


_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


def counters(engine: Engine) -> dict[str, int]:
    """How far the engine has counted. It has no function that sets them: its own checkpoints carry
    them.
    """
    return {name: vars(engine)[name] for name in _COUNTERS}


def set_counters(engine: Engine, **counts: int) -> None:
    """Set some of `counters`."""
    assert counts.keys() <= set(_COUNTERS)
    for name, count in counts.items():
        setattr(engine, name, count)


def set_completed_steps(engine: Engine, steps: int, skipped: int) -> None:
    """Let the engine stand where it stood after `steps` steps, of which `skipped` moved nothing."""
    set_counters(
        engine,
        micro_steps=steps * engine.gradient_accumulation_steps(),
        global_steps=steps,
        global_samples=steps * engine.train_batch_size(),
        skipped_steps=skipped,
    )


# --- The engine's monitors -----------------------------------------------------------------------


def silence_own_events(engine: Engine) -> None:
    """The engine would write the learning rate at every step; the progress monitor does, at its
    lines, and the monitors themselves stay open.
    """
    engine.monitor.enabled = False


def tensorboard_writer(engine: Engine) -> Any | None:
    """TensorBoard's own writer, for texts and pictures, which DeepSpeed's monitor does not take;
    None where the engine's file does not switch TensorBoard on, or on other ranks than 0.
    """
    monitor = engine.monitor.tb_monitor
    return None if monitor is None else monitor.summary_writer
