from collections.abc import Callable, Iterator

import pytest
from distributed.rank_group import RankGroup

from icl_moe.training.distributed import free_port


@pytest.fixture(scope="session")
def rank_group() -> Iterator[Callable[[int], RankGroup]]:
    """The group of N ranks, started when first asked for and shared by all tests."""
    groups: dict[int, RankGroup] = {}

    def get(world: int) -> RankGroup:
        if world not in groups:
            groups[world] = RankGroup(world, free_port())
        return groups[world]

    yield get
    for group in groups.values():
        group.close()
