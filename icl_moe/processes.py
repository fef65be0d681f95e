"""The processes that share the work of the stages without DeepSpeed (building shards, training a
tokenizer).

Apart from training/distributed.py because those stages must not wait for DeepSpeed's import.
"""

import os

import torch
from accelerate import PartialState


def join_processes() -> PartialState:
    """The processes that `accelerate launch` or torchrun started, or this one alone; to be called
    before anything else of accelerate.

    Without CUDA, accelerate joins torchrun's processes only if told that they use CPUs. Otherwise
    each would do all of the work.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=launched and not torch.cuda.is_available())
