"""Episodes: which regions stand together, k examples and a query of one class (and, where
a source has several ways to describe, of one style)."""

import zlib

import numpy as np
from tqdm import tqdm

from preprocessing.pool import Pool


def plan_episodes(pool: Pool, examples: int, samples: int | None, seed: int) -> np.ndarray:
    """Region numbers of each episode, int64 (samples, examples + 1), the query last.

    Queries run over the pool in shuffled order, again and again in new orders where more samples
    are asked for than it has regions (None: one pass). Examples are drawn uniformly from the
    query's class and style, each from another image than all others of the episode. An episode is
    a pure function of (pool, seed, task, its number). Every class must be seen in at least
    examples + 1 images in each of its styles, as `Pool.drop_small_classes` sees to.
    """
    count = len(pool.regions) if samples is None else samples
    if not pool.regions:
        return np.zeros((0, examples + 1), dtype=np.int64)
    task = zlib.crc32(pool.task.encode())
    members = {kind: np.array(numbers) for kind, numbers in pool.by_kind().items()}
    image_numbers: dict[str, int] = {}
    images = np.array(
        [image_numbers.setdefault(region.image.name, len(image_numbers)) for region in pool.regions]
    )
    episodes = np.empty((count, examples + 1), dtype=np.int64)
    for index in tqdm(range(count), desc=f"planning {pool.task}", unit="episode"):
        turn, place = divmod(index, len(pool.regions))
        if place == 0:
            order = np.random.default_rng([seed, task, 0, turn]).permutation(len(pool.regions))
        query = int(order[place])
        rng = np.random.default_rng([seed, task, 1, index])
        episodes[index] = (
            *_draw(rng, members[pool.regions[query].kind], images, query, examples),
            query,
        )
    return episodes


def _draw(
    rng: np.random.Generator, members: np.ndarray, images: np.ndarray, query: int, examples: int
) -> list[int]:
    """Regions of different images, none of them the query's: uniform draws, thrown away where the
    image was there before.
    """
    used = {int(images[query])}
    drawn: list[int] = []
    while len(drawn) < examples:
        region = int(members[rng.integers(len(members))])
        if int(images[region]) not in used:
            used.add(int(images[region]))
            drawn.append(region)
    return drawn
