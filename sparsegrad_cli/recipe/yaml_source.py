"""Read YAML with line numbers, as a recipe may use it. Imports no torch.

The loader builds plain data only. Beyond ``yaml.SafeLoader``:

- Numbers are those of YAML 1.2: ``1e-4`` is a number, ``1:30`` and dates are text.
- Size, depth, and what aliases and merges expand to are limited, so that no file takes long to
  read.
- Every error has its line, and every key keeps the place where it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.untrusted_text import printable_text

COMMAND_LINE = "command line"
KeyPath = tuple[str | int, ...]
MOST_BYTES = 256 * 1024  # the longest shipped recipe has 4 KiB
MOST_DEPTH = 40
MOST_NODES = 50_000  # with every alias expanded
_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_AS_BEFORE = ("null", "bool", "merge")  # kinds that are the same in YAML 1.1 and 1.2
_TEXT_KEYS = ("positive_label", "label_separator")
_LARGEST = 2**63 - 1
HALF = re.compile("[\0\ud800-\udfff]")  # neither a file name nor UTF-8 can hold these
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
         |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Place:
    """Where a value was written.

    Attributes:
        file: Its name, or ``command line``.
        line: 1-based, where known.
        strength: The rank of its layer, once layers are stacked; a stronger layer prevails.
        settled: Whether the file is the resolved recipe that a run has kept.
    """

    file: str
    line: int | None = None
    strength: int = field(default=-1, compare=False)
    settled: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def problem(self, key: str, what: str, fix: str | None = None) -> Problem:
        """Return a problem of this place; see :class:`Problem`."""
        return Problem(key, what, self.file, self.line, fix)


@dataclass
class Layer:
    """Settings from one source: plain data, and the place of each key path in it.

    Attributes:
        notes: What the user should know of stacked layers.
    """

    data: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_yaml(path: Path, shown_as: str | None = None) -> Layer:
    """Read one YAML file whose top level is a mapping.

    Raises:
        RecipeError: The file is missing, unreadable, too long, not YAML, or not a mapping.
    """
    name = shown_as or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise _refusal(f"has more than {MOST_BYTES // 1024} KiB, the limit for a recipe", name)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise _refusal("no such file", name) from None
    except IsADirectoryError:
        raise _refusal("is a folder, not a recipe", name) from None
    except UnicodeDecodeError as error:
        raise _refusal(f"is not UTF-8 text: {error}", name) from None
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        raise _refusal(f"cannot be read: {error}", name) from None
    return parse_yaml(text, name)


def _refusal(what: str, name: str, line: int | None = None) -> RecipeError:
    return RecipeError([Place(name, line).problem("(file)", what)])


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
        what = f"holds a {type(data).__name__}, but a recipe is a mapping of keys to values"
        raise _refusal(what, name, 1)
    layer.data = data
    return layer


def _collect_places(node: yaml.Node, path: KeyPath, name: str, layer: Layer) -> None:
    """Record the line of each key, and a problem for each key that is written twice."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            here = (*path, key_node.value)
            layer.places[here] = place = Place(name, key_node.start_mark.line + 1)
            if key_node.value in seen:
                layer.problems.append(place.problem(dotted(here), "is written twice"))
            seen.add(key_node.value)
            _collect_places(value_node, here, name, layer)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            here = (*path, number)
            layer.places[here] = Place(name, item.start_mark.line + 1)
            _collect_places(item, here, name, layer)


def parse_override(text: str) -> Layer:
    """Parse ``key.path=value`` into a layer with that one key; the value is read as YAML.

    Raises:
        RecipeError: There is no ``=``, the key is empty, the value is not YAML, or a key in it is
            written twice.
    """
    key, sign, raw = text.partition("=")
    parts, written = key.strip().split("."), Layer({})
    if not sign or not all(parts) or len(parts) > MOST_DEPTH:
        fix = "write overrides as key.path=value, for example train.learning_rate=1e-4"
        raise RecipeError([Place(COMMAND_LINE).problem(clip(text), "is not an override", fix)])
    try:
        if len(raw) > MOST_BYTES:
            raise yaml.YAMLError(f"it has more than {MOST_BYTES // 1024} KiB")
        value = load(
            raw,
            lambda node: _collect_places(node, tuple(parts), COMMAND_LINE, written),
            key=parts[-1],
        )
    except yaml.YAMLError as error:
        what = f"value {shorten(raw)} is not valid YAML: {clip(fault_of(error, raw)[0])}"
        raise RecipeError([Place(COMMAND_LINE).problem(clip(key), what)]) from None
    if written.problems:
        raise RecipeError([replace(problem, line=None) for problem in written.problems])
    return setting(key, value)


def setting(key: str, value: Any) -> Layer:
    """Return a layer with one key from the command line, whose value is used as it is.

    Raises:
        RecipeError: The value is a file name that is not UTF-8, which YAML cannot express.
    """
    if isinstance(value, str) and HALF.search(value):
        what = f"{value.encode(errors='replace').decode()!r} is not UTF-8 text"
        raise RecipeError([Place(COMMAND_LINE).problem(clip(key), what)])
    parts = key.strip().split(".")
    data: Any = value
    for part in reversed(parts):
        data = {part: data}
    return Layer(data, places_of(data, Place(COMMAND_LINE)))


def places_of(data: Mapping[str, Any], place: Place, at: KeyPath = ()) -> dict[KeyPath, Place]:
    """Return the same place for every key of plain data, at any depth."""
    found: dict[KeyPath, Place] = {}
    for key, value in data.items():
        found[(*at, key)] = place
        if isinstance(value, dict):
            found |= places_of(value, place, (*at, key))
    return found


def dotted(path: KeyPath) -> str:
    """Return a key path as text: ``("methods", 0, "name")`` is ``methods[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return clip(text) or "(top)"


def clip(text: str, most: int = 200) -> str:
    """Return a text, or the beginning of a long one, for a message."""
    return text if len(text) <= most else text[: most - 3] + "..."


def find_place(places: Mapping[KeyPath, Place], path: KeyPath) -> Place:
    """Return the place of a key path, or of its nearest parent that was written."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in places:
            return places[path[:depth]]
    return Place("defaults")


class _Loader(yaml.SafeLoader):
    """Compose and construct plain data within the limits above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, down to the largest depth."""
        if self._depth > MOST_DEPTH:
            raise _fault(ComposerError, f"is nested more than {MOST_DEPTH} deep", self.peek_event())
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct an object; report a scalar that does not fit its tag with its line."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            kind = node.tag.removeprefix(_TAG)
            raise _fault(
                ConstructorError, f"{shorten(node.value)} is not a valid {kind}", node
            ) from None
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise _fault(ConstructorError, "is too large for a whole number", node)
        if isinstance(value, str) and (found := HALF.search(value)):
            what = f"holds U+{ord(found[0]):04X}, which is not a character"
            raise _fault(ConstructorError, what, node)
        return value


_Loader.yaml_constructors = {
    tag: made
    for tag, made in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in _KINDS
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) in _AS_BEFORE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quote text that this loader or YAML 1.1 would read as a number."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def load(
    text: str, look: Callable[[yaml.Node], None] = lambda node: None, *, key: str | None = None
) -> Any:
    """Return the document as plain data whose keys are all text; None if it is empty.

    Args:
        look: Called with the document's node before merges are applied.
        key: The key whose value the document is, if it belongs to a mapping.

    Raises:
        yaml.YAMLError: The text is not YAML, or exceeds the limits.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(key, node)
        _measure(node, {})
        look(node)
        return loader.construct_document(node)
    finally:
        if loader is not None:
            loader.dispose()


def dump(data: Any) -> str:
    """Return YAML that :func:`load` reads back to equal data, and that is safe on a terminal."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if printable_text(text) != text:  # escape bidirectional marks with everything else
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
    return text


def fault_of(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    """Return what is wrong, and its 1-based line where known."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else None
        return str(error.problem or error), line
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"character U+{ord(text[error.position]):04X} is not allowed", line
    return str(error), None


def shorten(value: Any, most: int = 60) -> str:
    """Return the ``repr`` of a value, or its beginning."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the number of nodes and the depth of a node with all its aliases expanded.

    Each node is counted once and then looked up. Every key becomes text: the key of ``on: 1`` is
    not a boolean.

    Raises:
        ComposerError: The limits are exceeded, an alias contains itself, a key is not text, or a
            colon lacks its space.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _fault(ComposerError, "an alias contains itself", node)
        return found
    known[id(node)] = None
    nodes, depth = 1, 0
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        if isinstance(node, yaml.MappingNode):
            key, child = child
            if not isinstance(key, yaml.ScalarNode):
                raise _fault(ComposerError, "a key must be text, not a list or mapping", key)
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"
            _check_colon(key, child)
            _keep_text(key.value, child)
        more, below = _measure(child, known)
        nodes, depth = nodes + more, max(depth, below + 1)
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            what = f"expands to more than {MOST_NODES} values, or deeper than {MOST_DEPTH}"
            raise _fault(ComposerError, what, child)
    known[id(node)] = nodes, depth
    return nodes, depth


def _check_colon(key: yaml.ScalarNode, value: yaml.Node) -> None:
    """Refuse ``{a:3}``, which YAML reads as the key ``a:3`` without a value.

    Raises:
        ComposerError: There is a colon in an unquoted key that has no colon behind it.
    """
    alone = key.style is None and value.start_mark.index == key.end_mark.index
    if alone and ":" in key.value:
        name, _, rest = key.value.partition(":")
        what = f"{shorten(key.value)} lacks a space after the colon; write {name}: {rest}"
        raise _fault(ComposerError, clip(what), key)


def _keep_text(key: str | None, value: yaml.Node) -> None:
    """Keep the value of a key that names a class as text, such as ``no`` or ``01``."""
    if key in _TEXT_KEYS and isinstance(value, yaml.ScalarNode) and value.tag != f"{_TAG}null":
        value.tag = f"{_TAG}str"


def _fault(kind: type[yaml.MarkedYAMLError], what: str, at: Any) -> yaml.MarkedYAMLError:
    return kind(None, None, what, at.start_mark)
