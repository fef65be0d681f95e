"""Settings: YAML files read strictly into typed, frozen dataclasses.

Recipes of every stage, manifests and configurations are read in this way. An unknown key, a value
of the wrong type or out of its range (ranges.py), or settings that cannot work together are an
`InputError` that names the key and the nearest right one.
"""

import dataclasses
import functools
import math
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from icl_moe.errors import InputError, nearest, shown
from icl_moe.inputs import check_is_file

Recipe = TypeVar("Recipe")


def load_recipe(
    kind: type[Recipe], source: str, overrides: typing.Sequence[str] = (), package: str = "icl_moe"
) -> Recipe:
    """Read the recipe `source`, a path or the name of one shipped in `package`, with
    `key.path=value` overrides.

    Raises InputError if the file is missing or not YAML, if it has a key that `kind` lacks, or if a
    value has another type.
    """
    path = find_recipe(source, package)
    values = read_recipe(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(
                f"'{override}' is not a setting: write key=value, such as training.steps=20."
            )
        _assign(values, key.split("."), _parse_scalar(override, text))
    return _build(kind, values, origin=path.name, prefix="")


def find_recipe(source: str, package: str) -> Path:
    """The file for `source`, a path or the name of a shipped recipe."""
    if source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        check_is_file(path)
        return path
    folder = Path(str(resources.files(package))) / "recipes"
    path = folder / f"{source}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise InputError(
            f"There is no recipe named '{source}'{nearest(source, names)}; shipped are "
            f"{', '.join(names)}."
        )
    return path


def to_dict(recipe: Any) -> dict[str, Any]:
    """A recipe as plain values, as `load_recipe` would read them back from YAML."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def from_dict(kind: type[Recipe], values: dict[str, Any], origin: str) -> Recipe:
    """The inverse of `to_dict`, as strict as `load_recipe`; `origin` names the file in error
    messages.
    """
    return _build(kind, values, origin=origin, prefix="")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML as safe_load does, except that a repeated key is an error (plain YAML silently
    takes the last one), as is a whole number of absurd length, and that dates are read as text,
    since they may be names of folders.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(str(node.value)) > 1000:  # Python refuses to print very long numbers.
            raise yaml.constructor.ConstructorError(
                None, None, "a number has too many digits", node.start_mark
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{name}' occurs twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, `what` in messages. Raises InputError if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None)
        raise InputError(
            f"{path}{where} is not valid YAML{f': {problem}' if problem else ''}."
        ) from error


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe's file says, without overrides and defaults. Raises InputError if it is not
    YAML.
    """
    values = read_yaml(path, "The recipe")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    return values


def _parse_scalar(override: str, text: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader) if text else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = getattr(error, "problem", None)
        raise InputError(
            f"The value in '{override}' is not valid YAML{f': {what}' if what else ''}."
        ) from error


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[keys[-1]] = value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _build(kind: Any, values: Any, origin: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(
            f"{origin}: '{prefix.rstrip('.')}' must hold keys and values, not {values!r}."
        )
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            known = ", ".join(prefix + name for name in fields)
            raise InputError(
                f"{origin}: unknown key '{prefix}{key}'{nearest(str(key), list(fields), prefix)}; "
                f"known here are {known}."
            )
    arguments = {
        key: _convert(hints[key], value, origin, prefix + key) for key, value in values.items()
    }
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise InputError(f"{origin}: the key '{prefix}{name}' is missing.")
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error


def _convert(kind: Any, value: Any, origin: str, key: str, or_null: bool = False) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value if value is not None else {}, origin, key + ".")
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        number = _convert(options[0], value, origin, key)
        if demand := options[1].demand(number):
            demand = f"be null or {demand.removeprefix('be ')}" if or_null else demand
            raise InputError(f"{origin}: {key} must {demand}, not {shown(value)}.")
        return number
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        for option in inner[:-1]:
            try:
                return _convert(option, value, origin, key)
            except InputError:
                continue
        return _convert(inner[-1], value, origin, key, or_null=type(None) in options)
    if typing.get_origin(kind) is Literal:
        # YAML reads a bare `none` as text but `no`, `off` and `null` as values: take null to mean
        # the choice "none".
        value = "none" if value is None and "none" in options else value
        if value not in options:
            choices = " | ".join(str(option) for option in options)
            raise InputError(
                f"{origin}: '{key}' must be one of {choices}, not "
                f"{value!r}{nearest(str(value), [str(o) for o in options])}."
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{origin}: '{key}' must be a list, not {value!r}.")
        return tuple(_convert(options[0], item, origin, key) for item in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{origin}: '{key}' must hold keys and values, not {value!r}.")
        return {
            _convert(options[0], k, origin, key): _convert(options[1], v, origin, f"{key}.{k}")
            for k, v in value.items()
        }
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, which has no decimal point, as text.
        except OverflowError:
            return math.inf if isinstance(value, int) and value > 0 else -math.inf
        except ValueError:
            pass
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is Any or (
        isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    ):
        return value
    names: dict[type, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "keys and values",
    }
    raise InputError(f"{origin}: '{key}' must be {names.get(kind, kind.__name__)}, not {value!r}.")
