"""Episodes: which regions form an episode of k examples and a query of one class (and of one style,
if the source has several ways to describe).
"""

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.errors import InputError
from preprocessing.pool import Pool


def plan_episodes(
    pool: Pool, examples: int, samples: int | None, seed: int, balance: float = 0.0
) -> np.ndarray:
    """Region numbers of each episode, int64 (samples, examples + 1), the query last.

    Queries are the pool's queries in shuffled order; if `samples` exceeds their number, further
    passes use new orders (None: one pass). Examples are drawn uniformly from the query's class and
    style, each from a different photograph. An episode is a pure function of (pool, seed, task, its
    number). Every class must appear in enough photographs in each of its styles;
    `Pool.drop_small_classes` ensures this.

    With a `balance` above 0 queries are drawn instead, each independently of the others: a class in
    proportion to the number of its queries^(1 - balance), and one of its queries uniformly.

    In a share `pool.same_instance` of the episodes all regions show the same object, each in
    another image. If the next query's object does not appear in enough images, a random region
    whose object does takes its place. Raises InputError if there is no such region.
    """
    queries = pool.queries
    count = len(queries) if samples is None else samples
    if not queries:
        return np.zeros((0, examples + 1), dtype=np.int64)
    task = zlib.crc32(pool.task.encode())
    members = {kind: np.array(numbers) for kind, numbers in pool.by_kind().items()}
    photographs = _number(region.photograph for region in pool.regions)
    instances = _Instances(pool, examples)
    balanced = _Balanced(pool, balance) if balance else None
    episodes = np.empty((count, examples + 1), dtype=np.int64)
    for index in tqdm(range(count), desc=f"planning {pool.task}", unit="episode"):
        turn, place = divmod(index, len(queries))
        if place == 0:
            order = np.random.default_rng([seed, task, 0, turn]).permutation(len(queries))
        query = queries[int(order[place])]
        if balanced:
            query = balanced.query(np.random.default_rng([seed, task, 4, index]))
        rng = np.random.default_rng([seed, task, 1, index])
        if pool.same_instance:
            choice = np.random.default_rng([seed, task, 2, index])
            if choice.random() < pool.same_instance:
                query = instances.query(choice, query)
                drawn = _draw(rng, instances.members(query), instances.images, query, examples)
                episodes[index] = (*drawn, query)
                continue
        drawn = _draw(rng, members[pool.regions[query].kind], photographs, query, examples)
        episodes[index] = (*drawn, query)
    return episodes


class _Balanced:
    """Draws queries by their classes, see `plan_episodes`."""

    def __init__(self, pool: Pool, balance: float) -> None:
        of_class: dict[str, list[int]] = {}
        for number in pool.queries:
            of_class.setdefault(pool.regions[number].category, []).append(number)
        self._members = list(of_class.values())
        shares = np.array([len(numbers) for numbers in self._members]) ** (1.0 - balance)
        self._shares = shares / shares.sum()

    def query(self, rng: np.random.Generator) -> int:
        members = self._members[int(rng.choice(len(self._members), p=self._shares))]
        return members[int(rng.integers(len(members)))]


class _Instances:
    """The regions whose object appears, as the only one of its class, in enough images for an
    episode. `images`: the image number of each region.
    """

    def __init__(self, pool: Pool, examples: int) -> None:
        self._regions = pool.regions
        self.images = _number(str(region.image.path) for region in pool.regions)
        found: dict[tuple[Any, Any], list[int]] = {}
        for number, region in enumerate(pool.regions):
            if region.instance is not None:
                found.setdefault(region.instance, []).append(number)
        self._members = {
            instance: np.array(numbers)
            for instance, numbers in found.items()
            if len(np.unique(self.images[numbers])) > examples
        }
        self._eligible = sorted(n for numbers in self._members.values() for n in numbers.tolist())
        if pool.same_instance and not self._eligible:
            raise InputError(
                f"No object appears in the {examples + 1} images that an episode of one object "
                "needs; set segmentation.composed.images higher, examples lower, or "
                "segmentation.composed.same_instance=0."
            )

    def query(self, rng: np.random.Generator, number: int) -> int:
        """The region itself if an episode of its object is possible, otherwise a random region for
        which it is.
        """
        if self._regions[number].instance in self._members:
            return number
        return self._eligible[int(rng.integers(len(self._eligible)))]

    def members(self, query: int) -> np.ndarray:
        instance = self._regions[query].instance
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
        if int(images[region]) not in used:
            used.add(int(images[region]))
            drawn.append(region)
    return drawn
