"""Look up what a key of a recipe or a study means, from the schema itself. Imports no torch."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import nearest
from sparsegrad_cli.methods.registry import ALL_NAMES, METHODS, spelled_out
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study_section import Range, Study


@dataclass(frozen=True)
class Key:
    """A key of a recipe or a study, or a section of keys.

    Attributes:
        path: the dotted key, such as ``train.learning_rate``.
        type: what its value may be, in words; empty for a section.
        default: its default as YAML writes it; empty for a section and for a key without one.
        meaning: its description.
        owner: the methods that have it, for a key under ``method``; ``study`` for one of a study.
        inner: names of the keys of a section.
    """

    path: str
    type: str
    default: str
    meaning: str
    owner: str = ""
    inner: tuple[str, ...] = ()


def explain_key(asked: str) -> list[Key]:
    """Return what a name may mean: a dotted key, the last part of one, or a method.

    A key under ``method`` may mean something else for each method, so there may be several.

    Raises:
        UsageError: there is no such key or method; suggests a near one.
    """
    if asked in METHODS:
        return [_method(asked)]
    if asked.lower() in ALL_NAMES:
        return [_short_name(asked.lower())]
    keys = all_keys()
    found = [key for key in keys if key.path == asked]
    found = found or [key for key in keys if key.path.endswith(f".{asked}")]
    if found:
        return found
    names = {key.path.rpartition(".")[2] for key in keys} | {key.path for key in keys}
    near = nearest(asked, sorted(names | set(ALL_NAMES)))
    raise UsageError(
        f"{asked!r:.80} is not a key of a recipe or a study, nor a method",
        where="command line",
        fix=f"did you mean {near}?" if near else "sparsegrad explain lists the sections",
    )


def sections() -> list[Key]:
    """Return the keys of the first level of a recipe, in its order."""
    return [key for key in all_keys() if "." not in key.path and key.owner != "study"]


def methods() -> list[Key]:
    """Return all methods with their own names, without PEFT's."""
    return [_method(name) for name in METHODS]


def _method(name: str) -> Key:
    settings = METHODS[name]
    own = tuple(field for field in settings.model_fields if field != "name")
    return Key(f"method.name: {name}", "", "", _first_paragraph(settings), inner=own)


def _short_name(name: str) -> Key:
    written = spelled_out({"name": name})
    text = ", ".join(f"{key}: {_yaml(value)}" for key, value in written.items())
    meaning = f"Short for {{{text}}}; further keys are those of PEFT's own configuration."
    return Key(f"method.name: {name}", "", "", meaning)


@cache
def all_keys() -> tuple[Key, ...]:
    """Return every key of a recipe, of every method and of a study, sections before their keys."""
    found = [*_of_model(Recipe, "")]
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for name, settings in METHODS.items():
        for field, info in settings.model_fields.items():
            if field != "name":
                about = (f"method.{field}", *_about(info))
                merged.setdefault(about, []).append(name)
    found += [Key(*about, owner=", ".join(names)) for about, names in merged.items()]
    found += [
        Key(k.path, k.type, k.default, k.meaning, "study", k.inner) for k in _of_model(Study, "")
    ]
    return tuple(found)


def _of_model(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        if path == "method":
            yield Key(path, "", "", info.description or "", inner=("name", *_method_keys()))
            continue
        section = _section_in(info.annotation)
        if section is None:
            yield Key(path, *_about(info))
            if entry := _entry_in(info.annotation):
                yield Key(f"{path}[]", "", "", _first_paragraph(entry), inner=_fields(entry))
                yield from _of_model(entry, f"{path}[].")
        else:
            meaning = info.description or _first_paragraph(section)
            yield Key(path, "", "", meaning, inner=_fields(section))
            yield from _of_model(section, f"{path}.")


def _fields(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(model.model_fields)


def _entry_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section of which a field holds a list."""
    is_list = typing.get_origin(annotation) in (tuple, list)
    return _section_in(typing.get_args(annotation)[0]) if is_list else None


def _method_keys() -> list[str]:
    names = dict.fromkeys(f for settings in METHODS.values() for f in settings.model_fields)
    return [name for name in names if name != "name"]


def _about(info: FieldInfo) -> tuple[str, str, str]:
    """Return type, default and meaning of a field."""
    default = info.get_default(call_default_factory=False)
    shown = "" if default is PydanticUndefined else _yaml(default)
    return _type_words(info.annotation, info.metadata), shown, info.description or ""


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, perhaps as an option."""
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if len(found) == 1 else None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, UnionType)


def _type_words(annotation: Any, metadata: list[Any]) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_words(inner[0], [*metadata, *_constraints(inner[1:])])
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(_yaml, inner))
    if _is_union(annotation):
        parts = dict.fromkeys(_type_words(part, metadata) for part in inner if part is not NoneType)
        return " or ".join(parts)
    if origin in (tuple, list):
        return "a list"
    if origin is dict or annotation is dict:
        return "a mapping"
    plain = {
        bool: "true or false",
        Range: "a range",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    word = plain.get(annotation, getattr(annotation, "__name__", "a value"))
    return word + (_bounds(metadata) if annotation in (int, float) else "")


def _constraints(metadata: tuple[Any, ...]) -> list[Any]:
    return [part for held in metadata for part in getattr(held, "metadata", [held])]


def _bounds(metadata: list[Any]) -> str:
    words = []
    for name, text in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        limit = next(
            (getattr(m, name) for m in metadata if getattr(m, name, None) is not None), None
        )
        if limit is not None and limit != 2**31 - 1:
            words.append(f"{text} {limit if isinstance(limit, int) else format(limit, 'g')}")
    return f", {' and '.join(words)}" if words else ""


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_paragraph(model: type[BaseModel]) -> str:
    text = inspect.getdoc(model) or ""
    return " ".join(text.split("\n\n", 1)[0].replace("``", "").split())
