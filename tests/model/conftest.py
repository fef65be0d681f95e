from collections.abc import Callable, Iterator

import pytest
from torch import nn

from icl_moe.training.distributed import free_port


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Gives the expert layers of a model their process groups, in a world of one."""
    from icl_moe.training.distributed import process_group

    def join(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                module.set_deepspeed_parallelism()
        return model

    # Commands that later tests start must not take themselves for a rank of this group.
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            environment.setenv(name, str(value))
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        environment.setenv("MASTER_PORT", str(free_port()))
        with process_group():
            yield join
