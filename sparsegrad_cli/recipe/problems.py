"""Put the errors of pydantic in plain words, with suggestions. Imports no torch."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union

from pydantic import BaseModel

from sparsegrad_cli.io.plain_types import PLAIN_TYPES
from sparsegrad_cli.io.suggest import did_you_mean, listed, suggest
from sparsegrad_cli.methods.registry import ALL_NAMES, METHOD_NAMES, METHODS
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.yaml_source import KeyPath, shorten

# Keys of other tools, and their keys here.
_ELSEWHERE = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.num_train_epochs",
    "max_length": "task.max_length",
    "max_steps": "train.max_steps",
    "rank": "method.rank",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "density": "method.density",
    "model_name_or_path": "model.name",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "group_by_length": "train.train_sampling_strategy: group_by_length",
    "evaluation_strategy": "train.eval_strategy",
    "data_seed": "seed (it seeds the data order too)",
}
# Short forms in keys of other tools.
_SHORT = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay"}
_MOST_KEYS, _MOST_METHODS = 10, 5  # Names in one message.
_EXPECTED = {
    **PLAIN_TYPES,
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
# Names of methods in other tools, and how to write them here.
_METHODS_ELSEWHERE = {
    "qlora": "it is written method: lora with model.quantization: 4bit",
    "full_finetuning": "it is written method: full",
    "finetune": "it is written method: full",
}


def explain(detail: Mapping[str, Any], schema: type[BaseModel]) -> tuple[KeyPath, str, str | None]:
    """Return the key path of a pydantic error, what is wrong, and what to do."""
    kind = detail["type"]
    path, sections = _walk(tuple(detail["loc"]), schema, unknown=kind == "extra_forbidden")
    context = detail.get("ctx") or {}
    if kind == "extra_forbidden":
        return path, "is not a key here", _suggest_key(path, sections)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = context.get("tag")
        path = (*path, "name")
        if given is None:
            return path, "is missing", f"one of {', '.join(METHOD_NAMES)}"
        return path, f"{shorten(given)} is not a method", method_advice(str(given))
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        choices = tuple(part.strip("' ") for part in expected.replace(" or ", ", ").split(", "))
        given = detail.get("input")
        return path, f"{shorten(given)} is not one of {expected}", did_you_mean(str(given), choices)
    if kind == "missing":
        return path, "is missing", None
    if kind == "value_error":
        error = context.get("error")
        key = next(iter(getattr(error, "keys", ())), None)
        path = path if key is None else (*path, *key.split("."))
        return path, str(error or detail["msg"]), getattr(error, "fix", None)
    given = detail.get("input")
    return path, _type_problem(detail), _type_fix(kind, given)


def _type_problem(detail: Mapping[str, Any]) -> str:
    """Return what is wrong with a value of a wrong type, length or range."""
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx") or {}
    if kind == "too_short":
        length = context["actual_length"]
        return (
            f"expected at least {context['min_length']} values, got {length}"
            if length
            else ("the list is empty")
        )
    if kind == "string_too_short" and not given:
        return "expected a text, got an empty one"
    if kind == "too_long":
        return f"expected at most {context['max_length']} values, got {context['actual_length']}"
    given = list(given) if isinstance(given, tuple) else given  # as YAML writes it
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {shorten(given)}"
    return f"{shorten(given)} {str(detail['msg']).removeprefix('Input ')}"


def _walk(
    loc: tuple[Any, ...], schema: type[BaseModel], *, unknown: bool
) -> tuple[KeyPath, list[type[BaseModel]]]:
    """Remove what pydantic adds to a location (union tags), and find the sections of its parent."""
    path: list[str | int] = []
    sections: list[type[BaseModel]] = [schema]
    last = len(loc) - 1
    for at, part in enumerate(loc):
        if isinstance(part, int) or (unknown and at == last):  # an unknown key, whatever its name
            path.append(part)
            continue
        tagged = [s for s in sections if _tag_of(s) == part and part not in s.model_fields]
        if tagged and len(sections) > 1:
            sections = tagged
        elif "[" in part or part in ("str", "int", "float", "bool", "tuple"):
            continue  # a branch of a plain union, such as str | tuple[int, ...]
        else:
            path.append(part)
            if at < last:
                sections = [m for s in sections for m in _sections_of(s, part)] or sections
    return tuple(path), sections


def _tag_of(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("name")
    choices = typing.get_args(field.annotation) if field is not None else ()
    return choices[0] if len(choices) == 1 and isinstance(choices[0], str) else None


def _sections_of(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    field = section.model_fields.get(key)
    return _models_in(field.annotation) if field is not None else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (Union, UnionType, Annotated, tuple, dict):
        found = [_models_in(item) for item in typing.get_args(annotation)]
        return [model for models in found for model in models]
    return []


def _suggest_key(path: KeyPath, sections: list[type[BaseModel]]) -> str | None:
    key = str(path[-1])
    known = tuple(dict.fromkeys(name for section in sections for name in section.model_fields))
    close = did_you_mean(key, known)
    if close:
        return close
    takers = [name for name, method in METHODS.items() if key in method.model_fields]
    if path[0] == "method" and takers:
        return f"it is a key of {listed(takers, _MOST_METHODS)}"
    in_study = "settings" in known
    if in_study and key in Recipe.model_fields:
        return f"for all runs it is written settings: {{{key}: ...}}"
    if key in _ELSEWHERE:
        return f"it is written {_ELSEWHERE[key]}{', under settings' if in_study else ''}"
    first, dot, rest = key.partition(".")
    if dot and first in known:
        return f"write it nested: {first}: {{{rest}: ...}}"
    full = "_".join(_SHORT.get(part, part) for part in key.split("_"))
    return suggest(full, known, _MOST_KEYS) if known else None


def method_advice(given: str) -> str:
    """Return which method was probably meant by an unknown name."""
    return _METHODS_ELSEWHERE.get(given.lower()) or _suggested(given)


def _suggested(given: str) -> str:
    """Return the most similar name; the list of choices is that of the methods' own names."""
    near = did_you_mean(given, ALL_NAMES)
    choices = f"choose one of: {', '.join(METHOD_NAMES)}; or a PEFT type such as dora or vera"
    return f"{near} Or {choices}" if near else choices


def _type_fix(kind: str, given: Any) -> str | None:
    if isinstance(given, str) and kind in ("float_type", "int_type", "bool_type"):
        if _reads_as(kind, given):
            return "write it without quotes"
        return "such as 0.001" if kind == "float_type" else None
    return None


def _reads_as(kind: str, text: str) -> bool:
    """Return whether a quoted value would have its key's type without the quotes."""
    if kind == "bool_type":
        return text.lower() in ("true", "false")
    try:
        return math.isfinite(float(text) if kind == "float_type" else int(text))
    except ValueError:
        return False
