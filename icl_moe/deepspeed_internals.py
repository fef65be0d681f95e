"""All uses of DeepSpeed beyond its public interface, each with its reason.

For this reason pyproject.toml restricts DeepSpeed to one minor version.
tests/distributed/test_deepspeed_internals.py fails if another version changes one of these
internals. The expert layers, which are subclasses of DeepSpeed's, are in model/deepspeed_moe.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
from deepspeed.moe import mappings
from deepspeed.utils import groups
from torch import Tensor, nn
from torch import distributed as dist

Engine = Any
"""A deepspeed.DeepSpeedEngine, which has no type annotations."""


# --- Before there is an engine -------------------------------------------------------------------


def leave_out_shared_memory_collective() -> None:
    """Prevent DeepSpeed from compiling a collective for inference on CPUs when the ranks connect:
    this takes half a minute and a C++ compiler, and no setting turns it off.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_model_parallel_unit(unit: Any) -> None:
    """Set the unit that expert layers read when they are built, which is before
    `deepspeed.initialize(mpu=...)`. None removes the unit of an earlier engine of this process.
    """
    groups.mpu = unit


def tensor_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the other parts of this rank's matrices, according to the unit that was
    set.
    """
    return groups.mpu.get_tensor_model_parallel_group()


def gather_tokens_by(gather: Callable[..., Tensor]) -> None:
    """Replace the function with which stock expert layers gather tokens from tensor ranks: it
    passes gloo a flat output for an N-dimensional input, which gloo refuses.
    """
    mappings._gather_tokens = gather


# --- Experts' groups -----------------------------------------------------------------------------


def expert_parallel_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks over which the experts of this parameter's layer are spread. DeepSpeed has no
    public function from a parameter to its group.
    """
    return groups._get_expert_parallel_group(_group_name(parameter))


def expert_data_parallel_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold copies of this expert's parameter."""
    return groups._get_expert_data_parallel_group(_group_name(parameter))


def _group_name(parameter: nn.Parameter) -> str:
    """The group name with which DeepSpeed tags the parameters of experts."""
    name: str = vars(parameter)["group_name"]
    return name


# --- The engine's optimizer ----------------------------------------------------------------------


class OptimizedRange(NamedTuple):
    """The range of a flattened parameter that this rank optimizes: its `length` numbers from
    `start` are stored from `offset` in `master`, a float32 tensor of the optimizer.
    """

    start: int
    length: int
    master: Tensor
    offset: int


def optimized_range(
    engine: Engine, parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]
) -> OptimizedRange:
    """The range of a parameter that this rank optimizes. DeepSpeed's public functions (such as
    `safe_get_full_fp32_param`) only return the whole state, gathered from all ranks.

    masters: the result of `master_weights`.
    """
    optimizer = engine.optimizer
    if is_partitioned(parameter):
        # Stage 3: every rank has a part of every parameter; the last parts are padded.
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * length
        held = max(0, min(length, whole_shape(parameter).numel() - start))
        return OptimizedRange(start, held, optimizer.fp32_partitioned_groups_flat[group], offset)
    if hasattr(parameter, "_hp_mapping"):
        # Stages 1 and 2: a rank has a part of the concatenated parameters of a group.
        mapping = parameter._hp_mapping
        if mapping is None:
            return OptimizedRange(0, 0, parameter, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
        return OptimizedRange(here.start, here.numel, master, there.start)
    return OptimizedRange(0, parameter.numel(), masters.get(parameter, parameter), 0)


def master_weights(engine: Engine) -> dict[nn.Parameter, Tensor]:
    """The master weight of each parameter with bf16 and without ZeRO, for which there is no public
    function. Empty otherwise.
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
    """Copy changed float32 master weights into the model's working weights. DeepSpeed itself does
    so only after a step and after it has read its own checkpoint.
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
    """Whether ZeRO stage 3 partitions this parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> Any:
    """The shape of a parameter, even if stage 3 partitions it and its own shape is (0,)."""
    return vars(parameter).get("ds_shape", parameter.shape)


# --- The engine's steps --------------------------------------------------------------------------


def norm_of_the_step_at_hand(engine: Engine) -> float | None:
    """The global gradient norm before clipping, for use within the optimizer's step;
    `engine.get_global_grad_norm()` returns it only after the step. None after an overflow.
    """
    norm = engine.optimizer._global_grad_norm
    return None if norm is None else float(norm)


_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")


def counters(engine: Engine) -> dict[str, int]:
    """The engine's step counters. It has no function to set them, except by loading its own
    checkpoints.
    """
    return {name: vars(engine)[name] for name in _COUNTERS}


def set_counters(engine: Engine, **counts: int) -> None:
    """Set some of `counters`."""
    assert counts.keys() <= set(_COUNTERS)
    for name, count in counts.items():
        setattr(engine, name, count)


def set_completed_steps(engine: Engine, steps: int, skipped: int) -> None:
    """Set the engine's counters to `steps` completed steps, `skipped` of which were skipped."""
    set_counters(
        engine,
        micro_steps=steps * engine.gradient_accumulation_steps(),
        global_steps=steps,
        global_samples=steps * engine.train_batch_size(),
        skipped_steps=skipped,
    )


# --- The engine's monitors -----------------------------------------------------------------------


def silence_own_events(engine: Engine) -> None:
    """Stop the engine from writing the learning rate at every step, since the progress monitor
    writes it with its lines. The monitors themselves stay open.
    """
    engine.monitor.enabled = False


def tensorboard_writer(engine: Engine) -> Any | None:
    """TensorBoard's writer, for texts and pictures, which DeepSpeed's monitor does not support.
    None if the engine's file does not enable TensorBoard, and on ranks other than 0.
    """
    monitor = engine.monitor.tb_monitor
    return None if monitor is None else monitor.summary_writer
