"""The base of all records: how they are read, written and checked.

A record is a pydantic model of one JSON file. Its field names are the keys in the file. Unknown
keys are ignored when a file is read, and refused when a record is written.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparsegrad_cli.io.atomic import without_nan
from sparsegrad_cli.io.plain_types import PLAIN_TYPES

SCHEMA = 1
_SHOWN = 3  # Problems in one error message.
_LONGEST = 60  # Characters of a value in one.


@dataclass(frozen=True)
class Unit:
    """The unit of a number, for the generated schema page."""

    name: str


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(key: object) -> object:
    plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19
    return int(key) if plain and isinstance(key, str) else key


# A number that may be unknown. NaN and the infinities, which JSON does not have, become None.
Number = Annotated[float | None, BeforeValidator(_finite)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Bytes = Annotated[Count, Unit("bytes")]
Seconds = Annotated[Number, Unit("seconds")]
Fraction = Annotated[Number, Unit("fraction, 0 to 1")]
Matrix = list[list[Number]]
# A step that is a key of a JSON object, where keys are text.
StepKey = Annotated[int, BeforeValidator(_step), Field(ge=0)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Block(BaseModel):
    """A part of a record. Types are strict: text is not read as a number."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="ignore",
        protected_namespaces=(),
        validate_by_name=True,
        serialize_by_alias=True,
        defer_build=True,  # Commands that read no record do not wait for its validator.
    )

    def to_json(self) -> dict[str, Any]:
        """Return the block as JSON values: keys that were never set are left out."""
        found: dict[str, Any] = without_nan(self.model_dump(mode="json", exclude_unset=True))
        return found

    def changed(self, **changes: object) -> Self:
        """Return a copy with other values; validates them.

        Raises:
            ValidationError: a value is not of its field's type, or no field has the name.
        """
        return type(self).model_validate({**self.given(), **changes}, extra="forbid")

    def without(self, *names: str) -> Self:
        """Return a copy in which some keys were never set."""
        kept = {name: value for name, value in self.given().items() if name not in names}
        return type(self).model_validate(kept)

    def given(self) -> dict[str, Any]:
        """Return the values that were set, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def now() -> str:
    """Return the time in UTC to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Record(Block):
    """A whole file, with the version of its layout."""

    schema_version: int = Field(
        SCHEMA, alias="schema", description="Raised when a key changes its meaning."
    )

    def to_json(self) -> dict[str, Any]:
        """Return the file's content; keys that were never set are left out."""
        return {"schema": self.schema_version, **super().to_json()}


def problems(error: ValidationError) -> str:
    """Return the first few problems of a record in plain words.

    For example: ``counts.trainable: expected a whole number, got 'many'``.
    """
    found = [_problem(dict(detail)) for detail in error.errors(include_url=False)]
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


_EXPECTED = {
    **PLAIN_TYPES,
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def _problem(detail: Mapping[str, Any]) -> str:
    parts = [part for part in detail["loc"] if part != "[key]"]
    path = _short("".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip("."))
    context, kind = detail.get("ctx") or {}, detail["type"]
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "extra_forbidden":
        return f"{path}: is not a key of this record"
    expected = _EXPECTED.get(kind) or (context.get("expected") and f"one of {context['expected']}")
    if not expected:
        message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
        expected = message[:1].lower() + message[1:]
    return f"{path}: expected {expected}, got {_short(repr(detail.get('input')))}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
