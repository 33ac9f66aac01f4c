"""YAML with its line numbers: every key keeps where it was written. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsegrad_cli.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file, and the 1-based line in it where known."""

    file: str
    line: int | None = None


@dataclass
class Layer:
    """One source of settings: plain data, and the place of each key path in it."""

    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """SafeLoader in which ``1e-4`` is a number (YAML 1.2), not a string (YAML 1.1)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
             |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path, shown_as: str | None = None) -> Layer:
    """Read one YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file is missing, unreadable, no YAML, or no mapping; exit code 2.
    """
    name = shown_as or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([Problem("(file)", "no such file", file=name)]) from None
    except IsADirectoryError:
        raise RecipeError([Problem("(file)", "is a folder, not a recipe", file=name)]) from None
    except UnicodeDecodeError as error:
        raise RecipeError([Problem("(file)", f"is not UTF-8 text: {error}", file=name)]) from None
    except OSError as error:
        raise RecipeError([Problem("(file)", f"cannot be read: {error}", file=name)]) from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Layer:
    """Parse YAML text; see :func:`read_yaml`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Layer({})
        layer = Layer({})
        _collect_places(node, (), name, layer)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        what = f"is not valid YAML: {error.problem or error}"
        raise RecipeError([Problem("(file)", what, file=name, line=line)]) from None
    except yaml.YAMLError as error:
        raise RecipeError([Problem("(file)", f"is not valid YAML: {error}", file=name)]) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        what = f"holds a {type(data).__name__}; a recipe is a mapping of keys to values"
        raise RecipeError([Problem("(file)", what, file=name, line=1)])
    layer.data = data
    return layer


def _collect_places(node: yaml.Node, path: KeyPath, name: str, layer: Layer) -> None:
    """Note the line of each key; a key written twice is a problem, not a silent override."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in seen:
                layer.problems.append(
                    Problem(dotted(here), "is written twice", file=name, line=line)
                )
            seen.add(key)
            layer.places[here] = Place(name, line)
            _collect_places(value_node, here, name, layer)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            here = (*path, number)
            layer.places[here] = Place(name, item.start_mark.line + 1)
            _collect_places(item, here, name, layer)


def parse_override(text: str) -> Layer:
    """``train.learning_rate=1e-4`` -> a layer with that one key. The value is read as YAML.

    Raises:
        RecipeError: no ``=``, an empty key, or a value that is no YAML.
    """
    key, sign, raw = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        fix = "write overrides as key.path=value, for example train.learning_rate=1e-4"
        raise RecipeError([Problem(text, "is not an override", file="command line", fix=fix)])
    loader = _Loader(raw)
    try:
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        what = f"value {raw!r} is not valid YAML: {error}"
        raise RecipeError([Problem(key, what, file="command line")]) from None
    finally:
        loader.dispose()
    data: Any = value
    places: dict[KeyPath, Place] = {}
    for depth in range(len(parts), 0, -1):
        places[tuple(parts[:depth])] = Place("command line")
        data = {parts[depth - 1]: data}
    return Layer(data, places)


def dotted(path: KeyPath) -> str:
    """``("methods", 0, "name")`` -> ``methods[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text or "(top)"


def find_place(places: Mapping[KeyPath, Place], path: KeyPath) -> Place:
    """The place of a key path, or of its nearest parent that was written down."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in places:
            return places[path[:depth]]
    return Place("defaults")
