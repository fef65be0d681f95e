"""Captions of objects in drawn scenes of the world of classes, in three styles: the place, the
colours, and the relation to another object.

All captions of an episode have one style, so that the examples tell how to describe the query.
Words vary within a style. Every text is true of its picture.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from icl_moe.images import PixelBox
from preprocessing.synthetic import relation_of, thirds, with_article

TEXTS = 2
"""The number of texts of each style per object."""


class SeenObject(NamedTuple):
    """What a caption needs: the name of the class, its outline and colours (one or two), and the
    box of the visible pixels.
    """

    name: str
    outline: str
    colours: tuple[str, ...]
    box: PixelBox


def describe(
    rng: np.random.Generator, objects: list[SeenObject], ground: str, side: int
) -> Iterator[tuple[int, str, str]]:
    """The number of an object, a style, and a text, for all objects of a scene that is `side`
    pixels square. An object without a clear relation to another has no text of style `relation`.
    """
    for number, seen in enumerate(objects):
        relations = _relations(number, objects)
        for _ in range(TEXTS):
            yield number, "place", _place(rng, seen, side)
            yield number, "colour", _colour(rng, seen, ground)
            if relations:
                yield number, "relation", _relation(rng, seen, relations)


def _place(rng: np.random.Generator, seen: SeenObject, side: int) -> str:
    down, across = thirds(seen.box, side, side)
    if across and down:
        ways = (f"in the {down} {across} corner", f"at the {down} {across}", f"{down} {across}")
    elif down:
        ways = (f"near the {down}", f"at the {down} in the middle", f"at the centre of the {down}")
    elif across:
        ways = (f"on the {across}", f"at the {across} side", f"halfway up on the {across}")
    else:
        ways = ("in the middle", "in the centre", "around the middle of the picture")
    where, noun = _pick(rng, ways), _noun(rng, seen)
    return _pick(
        rng,
        (
            where,
            f"it is {where}",
            f"{with_article(noun)} {where}",
            f"the {noun} is {where}",
            f"the {noun} can be found {where}",
            f"there is {with_article(noun)} {where}",
        ),
    )


def _colour(rng: np.random.Generator, seen: SeenObject, ground: str) -> str:
    both = list(seen.colours)
    rng.shuffle(both)
    colours = _pick(rng, (" and ", " with ")).join(both) if len(both) > 1 else both[0]
    behind = f"{ground} {_pick(rng, ('ground', 'background', 'backdrop'))}"
    noun = _noun(rng, seen)
    return _pick(
        rng,
        (
            f"{colours} on a {behind}",
            f"it is {colours}, on a {behind}",
            f"{with_article(noun)} in {colours} against a {behind}",
            f"the {noun} is {colours} and the {behind.split()[1]} {ground}",
            f"{colours} in front of a {behind}",
        ),
    )


_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _relations(number: int, objects: list[SeenObject]) -> list[tuple[str, str]]:
    """The relations of an object to others, if they are clear, each with a name of the other
    object.
    """
    found = []
    for other, seen in enumerate(objects):
        relation = relation_of(objects[number].box, seen.box) if other != number else None
        if relation is not None:
            short = f"{seen.colours[0]} {seen.outline}"
            alike = sum(f"{o.colours[0]} {o.outline}" == short for o in objects)
            found.append((relation, short if alike == 1 else seen.name))
    return found


def _relation(rng: np.random.Generator, seen: SeenObject, known: list[tuple[str, str]]) -> str:
    relation, other = known[int(rng.integers(len(known)))]
    way, back = _pick(rng, _RELATIONS[relation]), _pick(rng, _RELATIONS[_INVERSE[relation]])
    noun, article = _noun(rng, seen), with_article(other)
    return _pick(
        rng,
        (
            f"{way} the {other}",
            f"it is {way} {article}",
            f"{with_article(noun)} {way} {article}",
            f"the {noun} is {way} the {other}",
            f"{article} is {back} it",
        ),
    )


def _noun(rng: np.random.Generator, seen: SeenObject) -> str:
    return _pick(rng, (seen.outline, seen.outline, "shape", "thing", "object"))


def _pick(rng: np.random.Generator, ways: tuple[str, ...]) -> str:
    return ways[int(rng.integers(len(ways)))]
