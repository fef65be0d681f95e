"""Episodes: which regions form an episode of k examples and a query of one class (and of one style,
if the source has several ways to describe).
"""

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.errors import InputError
from preprocessing.pool import ROLES, Pool, groups_of, region_keys
from preprocessing.workers import ordered_map


def plan_episodes(
    pool: Pool,
    examples: int,
    samples: int | None,
    seed: int,
    balance: float = 0.0,
    workers: int = 0,
) -> np.ndarray:
    """Region numbers of each episode, int64 (samples, examples + 1), the query last.

    Queries are the pool's queries in shuffled order; if `samples` exceeds their number, further
    passes use new orders (None: one pass). Examples are drawn uniformly from the query's class and
    style, each from a different photograph. An episode is a pure function of (pool, seed, task, its
    number), so `workers` processes draw parts of them. Every class must appear in enough
    photographs in each of its styles; `Pool.drop_small_classes` ensures this.

    With a `balance` above 0 queries are drawn instead, each independently of the others: a class in
    proportion to the number of its queries^(1 - balance), and one of its queries uniformly.

    In a share `pool.same_instance` of the episodes whose query shows its class, all regions show
    the same object, each in another image. If the next query's object does not appear in enough
    images, a random region whose object does takes its place. Raises InputError if there is no such
    region.
    """
    plan = _Plan(pool, examples, seed, balance)
    count = len(plan.queries) if samples is None else samples
    if not len(plan.queries):
        return np.zeros((0, examples + 1), dtype=np.int64)
    chunks = [range(n, min(n + _CHUNK, count)) for n in range(0, count, _CHUNK)]
    episodes = np.empty((count, examples + 1), dtype=np.int64)
    with tqdm(total=count, desc=f"planning {pool.task}", unit="episode") as progress:
        for chunk, drawn in zip(
            chunks, ordered_map(_draw_chunk, plan, chunks, workers), strict=True
        ):
            episodes[chunk.start : chunk.stop] = drawn
            progress.update(len(chunk))
    return episodes


_CHUNK = 8192
"""Episodes that a process draws at once."""


class _Plan:
    """What an episode is drawn from."""

    def __init__(self, pool: Pool, examples: int, seed: int, balance: float) -> None:
        keys = region_keys(pool.regions)
        self.seed, self.task, self.examples = seed, zlib.crc32(pool.task.encode()), examples
        self.queries = np.flatnonzero(keys.roles != ROLES.index("example"))
        as_examples = np.flatnonzero(keys.roles != ROLES.index("query"))
        self.kinds, self.photographs = keys.kinds, keys.photographs
        self.members = {
            kind: as_examples[places] for kind, places in groups_of(keys.kinds[as_examples]).items()
        }
        self.same_instance = pool.same_instance
        self.instances = _Instances(pool, examples) if pool.same_instance else None
        self.balanced = _Balanced(self.queries, keys.categories, balance) if balance else None
        self._orders: dict[int, np.ndarray] = {}

    def query(self, index: int) -> int:
        """The region that is the query of an episode."""
        if self.balanced is not None:
            return self.balanced.query(np.random.default_rng([self.seed, self.task, 4, index]))
        turn, place = divmod(index, len(self.queries))
        if turn not in self._orders:
            rng = np.random.default_rng([self.seed, self.task, 0, turn])
            self._orders = {turn: self.queries[rng.permutation(len(self.queries))]}
        return int(self._orders[turn][place])

    def episode(self, index: int) -> tuple[int, ...]:
        query = self.query(index)
        rng = np.random.default_rng([self.seed, self.task, 1, index])
        if self.instances is not None:
            choice = np.random.default_rng([self.seed, self.task, 2, index])
            if choice.random() < self.same_instance and query not in self.instances.absent:
                query = self.instances.query(choice, query)
                members = self.instances.members(query)
                return *_draw(rng, members, self.instances.images, query, self.examples), query
        members = self.members[int(self.kinds[query])]
        return *_draw(rng, members, self.photographs, query, self.examples), query


def _draw_chunk(plan: _Plan, numbers: range) -> np.ndarray:
    return np.array([plan.episode(index) for index in numbers], dtype=np.int64)


class _Balanced:
    """Draws queries by their classes, see `plan_episodes`. queries: their numbers. categories: the
    class of each region, as a number.
    """

    def __init__(self, queries: np.ndarray, categories: np.ndarray, balance: float) -> None:
        groups = groups_of(categories[queries]).values()
        # In the order of their first queries, so that the draws do not depend on how classes are
        # numbered.
        self._members = [queries[places] for places in sorted(groups, key=lambda group: group[0])]
        shares = np.array([len(numbers) for numbers in self._members]) ** (1.0 - balance)
        self._shares = shares / shares.sum()

    def query(self, rng: np.random.Generator) -> int:
        members = self._members[int(rng.choice(len(self._members), p=self._shares))]
        return int(members[rng.integers(len(members))])


class _Instances:
    """The regions whose object appears, as the only one of its class, in enough images for an
    episode. `images`: the image number of each region. `absent`: the regions without an object.
    """

    def __init__(self, pool: Pool, examples: int) -> None:
        self._of_region = [region.instance for region in pool.regions]
        self.images = _number(str(region.image.path) for region in pool.regions)
        self.absent = {n for n, region in enumerate(pool.regions) if region.is_absent}
        found: dict[tuple[Any, Any], list[int]] = {}
        for number, instance in enumerate(self._of_region):
            if instance is not None:
                found.setdefault(instance, []).append(number)
        self._members = {
            instance: np.array(numbers)
            for instance, numbers in found.items()
            if len(np.unique(self.images[numbers])) > examples
        }
        self._eligible = sorted(n for numbers in self._members.values() for n in numbers.tolist())
        if not self._eligible:
            raise InputError(
                f"No object appears in the {examples + 1} images that an episode of one object "
                "needs; set segmentation.composed.images higher, examples lower, or "
                "segmentation.composed.same_instance=0."
            )

    def query(self, rng: np.random.Generator, number: int) -> int:
        """The region itself if an episode of its object is possible, otherwise a random region for
        which it is.
        """
        if self._of_region[number] in self._members:
            return number
        return self._eligible[int(rng.integers(len(self._eligible)))]

    def members(self, query: int) -> np.ndarray:
        instance = self._of_region[query]
        assert instance is not None, "`query` returns only regions with an instance"
        return self._members[instance]


def _number(names: Iterable[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def _draw(
    rng: np.random.Generator, members: np.ndarray, images: np.ndarray, query: int, examples: int
) -> list[int]:
    """Regions of different images, none of them the query's: uniform draws, rejecting images that
    were already drawn.
    """
    used = {int(images[query])}
    drawn: list[int] = []
    while len(drawn) < examples:
        region = int(members[rng.integers(len(members))])
        image = int(images[region])
        if image not in used:
            used.add(image)
            drawn.append(region)
    return drawn
