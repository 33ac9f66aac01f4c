"""YAML with its line numbers: every key keeps where it was written. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.recipe.yaml_text import HALF, MOST_BYTES, MOST_DEPTH, fault_of, load, shorten

COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written.

    Attributes:
        file: its name, or ``command line``.
        line: 1-based, where known.
        strength: of its layer, once layers are stacked: what is written more strongly prevails.
        settled: the file is the recipe that a run has resolved and kept.
    """

    file: str
    line: int | None = None
    strength: int = field(default=-1, compare=False)
    settled: bool = field(default=False, compare=False)


@dataclass
class Layer:
    """One source of settings: plain data, and the place of each key path in it."""

    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(path: Path, shown_as: str | None = None) -> Layer:
    """Read one YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file is missing, unreadable, no YAML, or no mapping; exit code 2.
    """
    name = shown_as or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise _refusal(f"has more than {MOST_BYTES // 1024} KiB: no recipe is that long", name)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise _refusal("no such file", name) from None
    except IsADirectoryError:
        raise _refusal("is a folder, not a recipe", name) from None
    except UnicodeDecodeError as error:
        raise _refusal(f"is not UTF-8 text: {error}", name) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise _refusal(f"cannot be read: {error}", name) from None
    return parse_yaml(text, name)


def _refusal(what: str, name: str, line: int | None = None) -> RecipeError:
    return RecipeError([Problem("(file)", what, file=name, line=line)])


def parse_yaml(text: str, name: str) -> Layer:
    """Parse YAML text; see :func:`read_yaml`."""
    layer = Layer({})
    try:
        data = load(text, lambda node: _collect_places(node, (), name, layer))
    except yaml.YAMLError as error:
        what, line = fault_of(error, text)
        raise _refusal(f"is not valid YAML: {clip(what)}", name, line) from None
    if data is None:
        return Layer({})
    if not isinstance(data, dict):
        what = f"holds a {type(data).__name__}; a recipe is a mapping of keys to values"
        raise _refusal(what, name, 1)
    layer.data = data
    return layer


def _collect_places(node: yaml.Node, path: KeyPath, name: str, layer: Layer) -> None:
    """Note the line of each key; a key written twice is a problem, not a silent override."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            here = (*path, key_node.value)
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                layer.problems.append(
                    Problem(dotted(here), "is written twice", file=name, line=line)
                )
            seen.add(key_node.value)
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
    if not sign or not all(parts) or len(parts) > MOST_DEPTH:
        fix = "write overrides as key.path=value, for example train.learning_rate=1e-4"
        problem = Problem(clip(text), "is not an override", file=COMMAND_LINE, fix=fix)
        raise RecipeError([problem])
    try:
        if len(raw) > MOST_BYTES:
            raise yaml.YAMLError(f"it has more than {MOST_BYTES // 1024} KiB")
        value = load(raw, key=parts[-1])
    except yaml.YAMLError as error:
        what = f"value {shorten(raw)} is not valid YAML: {clip(fault_of(error, raw)[0])}"
        raise RecipeError([Problem(clip(key), what, file=COMMAND_LINE)]) from None
    return setting(key, value)


def setting(key: str, value: Any) -> Layer:
    """A layer with one key from the command line, its value as it is.

    Raises:
        RecipeError: the name of a file that is no UTF-8, which no recipe could say.
    """
    if isinstance(value, str) and HALF.search(value):
        what = f"{value.encode(errors='replace').decode()!r} is no UTF-8 text"
        raise RecipeError([Problem(clip(key), what, file=COMMAND_LINE)])
    parts = key.strip().split(".")
    data: Any = value
    for part in reversed(parts):
        data = {part: data}
    return Layer(data, places_of(data, Place(COMMAND_LINE)))


def places_of(data: Mapping[str, Any], place: Place, at: KeyPath = ()) -> dict[KeyPath, Place]:
    """One place for every key of plain data, however deep."""
    found: dict[KeyPath, Place] = {}
    for key, value in data.items():
        found[(*at, key)] = place
        if isinstance(value, dict):
            found |= places_of(value, place, (*at, key))
    return found


def dotted(path: KeyPath) -> str:
    """``("methods", 0, "name")`` -> ``methods[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return clip(text) or "(top)"


def clip(text: str, most: int = 200) -> str:
    """Text that quotes a recipe, or its beginning: a message is no place for a page."""
    return text if len(text) <= most else text[: most - 3] + "..."


def find_place(places: Mapping[KeyPath, Place], path: KeyPath) -> Place:
    """The place of a key path, or of its nearest parent that was written down."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in places:
            return places[path[:depth]]
    return Place("defaults")
