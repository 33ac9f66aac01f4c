"""Strategies for hostile YAML: arbitrary trees, damaged shipped recipes, arbitrary bytes."""

from __future__ import annotations

import copy
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsegrad_cli.methods.full.settings import FullSettings
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study_section import Figure, MethodEntry, Study, TaskEntry
from sparsegrad_cli.recipe.task_section import ChatSection, ColumnsSection, TaskSection
from support.paths import REPO

SHIPPED = sorted([*(REPO / "configs").glob("*.yaml"), *(REPO / "recipes").glob("*.yaml")])

_SECTIONS: tuple[type[BaseModel], ...] = (
    Recipe,
    *(m.annotation for m in Recipe.model_fields.values() if isinstance(m.annotation, type)),
    *(FullSettings, LoraSettings, MepropSettings, SparsegradSettings),
    *(TaskSection, ChatSection, ColumnsSection),
    *(Study, MethodEntry, TaskEntry, Figure),
)
KEYS = sorted(
    {k for s in _SECTIONS if issubclass(s, BaseModel) for k in s.model_fields}
    | {"extends", "per_task", "learning_rates", "lr", "<<", "glue/rte", "0"}
)

_UTF8 = ("utf-8", "surrogatepass")

# Tokens that YAML reads as numbers, dates, tags, anchors or merges, or nearly does.
_WORDS = (
    "null ~ true no on 0 1 -1 3 64 1e-3 0.5 1.5 -0.0 1e999 -1e999 .inf -.inf .nan 0x_ 0b_ 0o9 "
    "0x1F 1_000 190:20:30 2020-13-45 2020-02-30T25:61:61Z = <<  !!int !!float !!bool !!null !!str "
    "!!binary !!timestamp !!set !!omap *a *b [] {} [[]] [{}] |- '' "
    "glue/cola glue/rte csv chat oasst builtin:acceptability builtin:minilm builtin:smollm2 "
    "sparsegrad lora meprop full core rotated materialized static dynamic refresh dense "
    "token batch random exact sequential randomized epoch steps all auto head rest trainable "
    "64MiB 9GiB ::3 ::0 1:2:3:4 pack concatenate 4bit 8bit bfloat16 ~nobody ~nobody/x ./x "
    "../../x / /dev/null . .. [1,2] [0,-1] [a,b] {name:x} '[red]' 'quickstart' "
    "peak=2GiB peak=1e9GiB seconds=600 trainable=70k trainable=9999999999999M peak= =7 "
    "configs/quickstart.yaml"
)
TOKENS = tuple(_WORDS.split(" "))
_TAGGED = (
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!binary '*'",
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/name:os.system",
    "!!python/object/new:type {}",
    "!custom {a: 1}",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "&a {x: 1}",
    "&a [*a]",
    "&b {<<: *b}",
    "{<<: [{a: 1}, {b: 2}]}",
    "{<<: 3}",
    "{? [a, b] : 1}",
    "{? {a: b} : 1}",
    "9" * 5000,
    "0x" + "f" * 5000,
    "1" + "0" * 400,
    "1" * 300 + ".5",
    r'"\ud800"',
    r'"\0"',
    r'"a\0b"',
    r'"\e[31m\r\x07\u202e"',
    '"' + "x" * 3000 + '"',
    "'" + "/x" * 3000 + "'",
)


def _text() -> st.SearchStrategy[str]:
    """Draw any text, quoted so that YAML reads it back (surrogates as escapes)."""
    return st.text(st.characters(exclude_categories=()), max_size=20).map(json.dumps)


def _number() -> st.SearchStrategy[str]:
    return st.one_of(
        st.integers().map(str),
        st.floats().map(repr),
        st.integers(-3, 300).map(str),
        st.floats(0, 1).map(repr),
    )


def scalars() -> st.SearchStrategy[str]:
    """Draw one value as written in a file."""
    return st.one_of(st.sampled_from(TOKENS), st.sampled_from(_TAGGED), _text(), _number())


def keys() -> st.SearchStrategy[str]:
    """Draw a key as written in a file, usually one that exists."""
    known = st.sampled_from(KEYS)
    return st.one_of(known, known, known, st.sampled_from(TOKENS), _text(), _number())


def _mapping(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"


def trees(root: type[BaseModel] = Recipe, start: str = "") -> st.SearchStrategy[str]:
    """Draw a YAML text in flow style with arbitrary keys, or with one or two existing keys.

    Keys may be repeated.

    Args:
        root: the model whose keys exist.
        start: text before the existing keys.
    """

    def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pairs = st.lists(st.tuples(keys(), inner), max_size=5).map(_mapping)
        items = st.lists(inner, max_size=4).map(lambda each: "[" + ", ".join(each) + "]")
        return st.one_of(pairs, pairs, items)

    value = st.recursive(scalars(), deeper, max_leaves=12)
    anything = st.lists(st.tuples(keys(), value), max_size=6)
    fields = [st.tuples(st.just(key), _of_field(field)) for key, field in root.model_fields.items()]
    likely = st.lists(st.one_of(fields), max_size=2)
    return st.one_of(anything.map(_lines), likely.map(lambda pairs: start + _lines(pairs)))


def _lines(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in pairs)


def _of_field(field: FieldInfo) -> st.SearchStrategy[str]:
    """Draw a value for a field; for a section, one or two of its own keys."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        pairs = [st.tuples(st.just(k), _of_field(f)) for k, f in kind.model_fields.items()]
        return st.lists(st.one_of(pairs), min_size=1, max_size=2).map(_mapping)
    fitting = {"int": ("1", "7"), "float": ("0.5", "1e-3"), "bool": ("true", "no"), "str": ("x",)}
    plain = [word for name, words in fitting.items() if name in str(kind) for word in words]
    likely = st.sampled_from((*_words_of(kind), *plain, "null"))
    return st.one_of(likely, likely, likely, scalars())


def _words_of(annotation: Any) -> list[str]:
    """Return the values of all Literals in an annotation."""
    if isinstance(annotation, str):
        return [annotation]
    return [word for each in typing.get_args(annotation) for word in _words_of(each)]


class _Raw(str):
    """A value or key that is written to the file unchanged."""


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of every value in a tree."""
    found = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(found):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


@st.composite
def damaged_recipes(draw: st.DrawFn, paths: tuple[Path, ...] = tuple(SHIPPED)) -> tuple[str, bytes]:
    """Draw (folder, content) of a shipped file with one to three mistakes."""
    path = draw(st.sampled_from(paths))
    data = copy.deepcopy(yaml.safe_load(path.read_text(encoding="utf-8")))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        _make_mistake(draw, container, key)
    text = yaml.safe_dump(_marked(data), sort_keys=False, allow_unicode=True, width=10**6)
    return path.parent.name, _bytes(_unmarked(text))


def _make_mistake(draw: st.DrawFn, container: Any, key: Any) -> None:
    """Drop, rename, replace, wrap, nest or repeat one value."""
    way = draw(st.sampled_from(("drop", "rename", "replace", "replace", "wrap", "nest", "grow")))
    value = container[key]
    if way == "drop":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        del container[key]
        container[_Raw(draw(keys()))] = value
    elif way == "wrap":
        container[key] = [value]
    elif way == "nest":
        container[key] = {draw(st.sampled_from(KEYS)): value}
    elif way == "grow" and isinstance(container, list):
        container.append(copy.deepcopy(value))
    else:
        container[key] = _Raw(draw(scalars()))


def _marked(data: Any) -> Any:
    """Return the tree with raw tokens as plain words that :func:`_unmarked` replaces."""
    if isinstance(data, _Raw):
        return f"RAW{_bytes(data).hex()}WAR"
    if isinstance(data, dict):
        return {_marked(key): _marked(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_marked(value) for value in data]
    return data


def _unmarked(text: str) -> str:
    return re.sub(r"RAW([0-9a-f]*)WAR", lambda m: bytes.fromhex(m[1]).decode(*_UTF8), text)


@st.composite
def damaged_bytes(draw: st.DrawFn) -> bytes:
    """Draw a shipped file with bytes cut, changed or inserted."""
    data = bytearray(draw(st.sampled_from(SHIPPED)).read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        way = draw(st.sampled_from(("cut", "put", "flip", "swap", "again")))
        if way == "cut":
            del data[at : at + draw(st.integers(1, 200))]
        elif way == "put":
            data[at:at] = draw(st.one_of(st.binary(max_size=8), scalars().map(_bytes)))
        elif way == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif way == "again":
            data[at:at] = data[at : at + draw(st.integers(1, 80))]
        elif data:
            other = draw(st.integers(0, len(data) - 1))
            data[at], data[other] = data[other], data[at]
    return bytes(data)


def _bytes(text: str) -> bytes:
    return text.encode(*_UTF8)


def random_bytes() -> st.SearchStrategy[bytes]:
    """Draw arbitrary bytes."""
    return st.one_of(
        st.binary(max_size=80),
        st.text(max_size=40).map(_bytes),
        st.sampled_from(
            (
                b"",
                b"\n",
                b"\xef\xbb\xbf",
                b"\0",
                b"\xff\xfe",
                b"---\n...\n---\n",
                b"%YAML 9.9\n---\n1",
            )
        ),
        st.text("{}[]:,&*!|>'\"%@`-? \n#ab1\t", max_size=40).map(_bytes),
    )
