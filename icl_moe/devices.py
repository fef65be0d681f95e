"""The device, the precision and the processors of a single process. Torch is imported only when it
is needed, so that the command line can read the names without waiting for it.
"""

import os
from typing import TYPE_CHECKING, Union

from icl_moe.errors import InputError

if TYPE_CHECKING:
    import torch

Device = Union[str, "torch.device"]
DTYPES = ("float32", "bfloat16")
"""The available precisions, by torch's names."""


def processors() -> int:
    """How many processors this process may use."""
    # Only Linux tells which of the machine's processors these are.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_device() -> "torch.device":
    """A GPU if there is one (CUDA, or Apple's Metal if torch supports it), otherwise the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_in_bf16(device: "torch.device") -> bool:
    """Whether the device has instructions for bfloat16. If it has none, a convolution in it takes
    up to a hundred times as long as one in float32.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def find_device(name: Device | None) -> "torch.device":
    """The device of that name, such as cpu, cuda, cuda:1 or mps; None means the default one. Raises
    InputError if this machine has no such device.
    """
    import torch

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if device is None or (device.index or 0) >= there.get(device.type, 0):
        names = [kind for kind, count in there.items() if count]
        shown = str(name)[:60] or "without a name"
        raise InputError(
            f"There is no device {shown} here; this machine has {' and '.join(names)}."
        )
    return device


def find_dtype(name: "str | torch.dtype | None") -> "torch.dtype | None":
    """The precision of that name, or itself; None stays None. Raises InputError for another."""
    import torch

    if name is None:
        return None
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"A dtype must be {' or '.join(DTYPES)}, not {name!s:.60}.")
    return getattr(torch, name)
