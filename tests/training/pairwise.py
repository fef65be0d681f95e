"""Pairwise testing: few rows in which any two values of any two factors occur together."""

import itertools
import random
from collections.abc import Mapping, Sequence

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]
"""A value for each of two factors."""


def covering_rows(
    factors: Mapping[str, Sequence[str]], refused: set[Pair], seed: int = 0
) -> list[Row]:
    """Rows with a value of every factor and without refused pairs, which together contain all other
    pairs.

    Greedy (after Cohen et al., "The AETG system", 1997): each row is the best of several random
    ones, each of which starts from a missing pair.
    """
    generator, rows = random.Random(seed), []
    missing = {
        frozenset([(one, a), (other, b)])
        for one, other in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    } - refused
    while missing:
        first = min(missing, key=sorted)
        candidates = [_complete(first, factors, refused, missing, generator) for _ in range(20)]
        found = [row for row in candidates if row is not None]
        assert found, f"nothing goes with {sorted(first)}: it belongs to the refused pairs"
        rows.append(max(found, key=lambda row: len(_pairs(row) & missing)))
        missing -= _pairs(rows[-1])
    return rows


def _complete(
    start: Pair,
    factors: Mapping[str, Sequence[str]],
    refused: set[Pair],
    missing: set[Pair],
    generator: random.Random,
) -> Row | None:
    """A row with the pair `start`; None if the random choices lead to none."""
    row = dict(start)
    for factor in generator.sample(sorted(set(factors) - set(row)), len(factors) - len(row)):
        allowed = [
            value
            for value in factors[factor]
            if not any(frozenset([(factor, value), item]) in refused for item in row.items())
        ]
        if not allowed:
            return None
        gains = [
            sum(frozenset([(factor, value), item]) in missing for item in row.items())
            for value in allowed
        ]
        row[factor] = generator.choice(
            [value for value, gain in zip(allowed, gains, strict=True) if gain == max(gains)]
        )
    return {factor: row[factor] for factor in factors}


def _pairs(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
