"""Where a process alone computes."""

import torch


def default_device() -> torch.device:
    """A GPU where there is one: CUDA, or Apple's Metal where this torch has it; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
