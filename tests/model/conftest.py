from collections.abc import Callable, Iterator

import pytest
from torch import nn


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Sets up the process groups of a model's expert layers for a single rank."""
    from icl_moe.training.distributed import process_group

    def join(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                module.set_deepspeed_parallelism()
        return model

    with process_group():
        yield join
