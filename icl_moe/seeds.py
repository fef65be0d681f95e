"""Seeds from names: the random numbers for a purpose depend only on that purpose, not on other
draws or on the process.
"""

import hashlib
from functools import lru_cache

import numpy as np


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any values whose repr is stable, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@lru_cache(maxsize=4)
def order_of_turn(count: int, seed: int, turn: int) -> np.ndarray:
    """The order in which `count` things are taken in a turn over all of them, as their numbers."""
    return np.random.default_rng([seed, turn]).permutation(count)
