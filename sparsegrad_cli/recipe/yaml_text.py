"""YAML as a recipe may use it: plain data of bounded size, and every fault with its line. No torch.

Beyond ``yaml.SafeLoader``, which builds no objects but those of its tags: numbers are those of YAML
1.2 (``1e-4`` is one, ``1:30`` and dates are words); a text is refused before it can take long,
whether by its bytes, its depth or what its aliases and merges unfold to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sparsegrad_cli.io.untrusted_text import printable_text

MOST_BYTES = 256 * 1024  # the longest recipe that comes along has 4 KiB
MOST_DEPTH = 40
MOST_NODES = 50_000  # with every alias unfolded
_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_AS_BEFORE = ("null", "bool", "merge")  # words that mean the same in YAML 1.1
_TEXT_KEYS = ("positive_label",)
_LARGEST = 2**63 - 1
HALF = re.compile("[\0\ud800-\udfff]")  # what neither a file's name nor UTF-8 can hold
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
         |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
         |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """Composes and constructs within the bounds above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As its parent's, to a depth."""
        if self._depth > MOST_DEPTH:
            raise _fault(ComposerError, f"is nested more than {MOST_DEPTH} deep", self.peek_event())
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As its parent's; what a scalar cannot be is a fault like any other."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            kind = node.tag.removeprefix(_TAG)
            raise _fault(ConstructorError, f"{shorten(node.value)} is no {kind}", node) from None
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise _fault(ConstructorError, "is too large for a whole number", node)
        if isinstance(value, str) and (found := HALF.search(value)):
            what = f"holds U+{ord(found[0]):04X}, which is no character of a text"
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
    """Puts words in quotes that either this loader or YAML 1.1 would take for a number."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def load(
    text: str, look: Callable[[yaml.Node], None] = lambda node: None, *, key: str | None = None
) -> Any:
    """The document as plain data, whose keys are all words; None if there is none.

    Args:
        look: called with the document's node before merges are worked in.
        key: the key whose value the document is, where it is one of a mapping's.

    Raises:
        yaml.YAMLError: it is not YAML of this kind.
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
    """Plain data as YAML that :func:`load` reads back equal, and that a terminal shows as it is."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if printable_text(text) != text:  # escape bidirectional marks with everything else
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
    return text


def fault_of(error: yaml.YAMLError, text: str) -> tuple[str, int | None]:
    """(what is wrong, its 1-based line where known)."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else None
        return str(error.problem or error), line
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"character U+{ord(text[error.position]):04X} is not allowed", line
    return str(error), None


def shorten(value: Any, most: int = 60) -> str:
    """A value as it would be written, or its beginning."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(nodes, depth) of a node with all aliases in it unfolded; counted once, however often met.

    On the way every key is made a word: ``on: 1`` and ``1: x`` have keys, not values.

    Raises:
        ComposerError: too many or too deep, an alias inside of what it stands for, or a key that
            is no word.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _fault(ComposerError, "an alias stands inside of what it names", node)
        return found
    known[id(node)] = None
    nodes, depth = 1, 0
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        if isinstance(node, yaml.MappingNode):
            key, child = child
            if not isinstance(key, yaml.ScalarNode):
                raise _fault(ComposerError, "a key is a word, and no list or mapping", key)
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"
            _keep_text(key.value, child)
        more, below = _measure(child, known)
        nodes, depth = nodes + more, max(depth, below + 1)
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            what = f"unfolds to more than {MOST_NODES} values, or deeper than {MOST_DEPTH}"
            raise _fault(ComposerError, what, child)
    known[id(node)] = nodes, depth
    return nodes, depth


def _keep_text(key: str | None, value: yaml.Node) -> None:
    """Take the value of a key that names a class as it is written: ``no`` and ``01`` are texts."""
    if key in _TEXT_KEYS and isinstance(value, yaml.ScalarNode) and value.tag != f"{_TAG}null":
        value.tag = f"{_TAG}str"


def _fault(kind: type[yaml.MarkedYAMLError], what: str, at: Any) -> yaml.MarkedYAMLError:
    return kind(None, None, what, at.start_mark)
