"""Mutations of files, as functions of a random generator: of bytes, such as disk errors, and of
JSON and YAML values, such as mistakes of people and tools.
"""

import copy
import json
from typing import Any

import numpy as np
import yaml

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "1",
    "nan",
    "../../etc/passwd",
    "/etc/passwd",
    "a" * 400,
    "\ud83d",
    "\x00",
    [],
    [[]],
    [1, 2],
    [None],
    {},
    {"id": 1},
)


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of a few bytes: replaced, removed, inserted, or the file truncated."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, len(data) + 1))
        length = int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        if kind == 0:
            data[place : place + length] = rng.bytes(length)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = rng.bytes(length)
        elif kind == 3:
            data[place:place] = data[: int(rng.integers(0, 200))]
        else:
            del data[place:]
    return bytes(data)


def mutate_values(content: Any, rng: np.random.Generator) -> Any:
    """One to three changes within lists and dictionaries: an odd value, a removed entry, a repeated
    entry, or another key.
    """
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(content))
        if not places:
            return ODD_VALUES[rng.integers(len(ODD_VALUES))]
        holder, key = places[rng.integers(len(places))]
        kind = rng.integers(0, 6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[f"{key}s"] = holder.pop(key)
        elif kind == 2:
            holder[key] = _kin(holder[key], rng)
        else:
            holder[key] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
    return content


def mutate_json(content: bytes, rng: np.random.Generator) -> bytes:
    """A JSON file with other values, or other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    return json.dumps(mutate_values(json.loads(content), rng)).encode()


def mutate_lines(content: bytes, rng: np.random.Generator) -> bytes:
    """A file of lines of JSON with other values, or other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    lines = mutate_values([json.loads(line) for line in content.splitlines()], rng)
    return "\n".join(map(json.dumps, lines if isinstance(lines, list) else [lines])).encode()


def mutate_yaml(content: bytes, rng: np.random.Generator) -> bytes:
    """A YAML file with other values, or other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    values = mutate_values(yaml.safe_load(content), rng)
    return yaml.safe_dump(values, allow_unicode=False).encode("utf-8", "surrogatepass")


def _places(content: Any) -> Any:
    """(list or dictionary, index or key) of everything within a value."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys if isinstance(content, dict | list) else ():
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def _kin(value: Any, rng: np.random.Generator) -> Any:
    """A similar value."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return [value + 1, -value, value * 1000, value + 0.5][rng.integers(4)]
    if isinstance(value, str):
        return value.upper() if rng.random() < 0.5 else value[:-1]
    return [value] if rng.random() < 0.5 else str(value)
