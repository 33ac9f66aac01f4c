"""The text of a label, the number that a text writes, and classes that look alike.

docs/reference/labels.md has the rules.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from sparsegrad_cli.data.json_files import WrittenFloat
from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.io.suggest import listed

# Each of these returns a match or None. They take ASCII digits only: float() also takes "1_000",
# "nan" and the digits of other scripts.
is_number = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?").fullmatch
is_integer = re.compile(r"[+-]?[0-9]+").fullmatch
is_plain_integer = re.compile(r"0|-?[1-9][0-9]*").fullmatch  # no plus sign, no leading zeros
is_number_with_commas = re.compile(r"[+-]?[0-9]+(,[0-9]+)+(\.[0-9]+)?").fullmatch
# Common marks of a missing value. Infinity is as unusable as a score as NaN is.
is_missing_mark = re.compile(
    r"#?n/?a|<na>|nan|nil|null|none|missing|[+-]?inf(inity)?|--?|\?|\.", re.ASCII | re.IGNORECASE
).fullmatch


class LabelValueError(ValueError):
    """A value that cannot be a label; the message says what it is."""


def label_text(value: Any, class_names: Sequence[str] | None) -> str:
    """Return the text of a label.

    Args:
        value: the cell of the label column.
        class_names: names of a ClassLabel column, whose values are ids.

    Raises:
        LabelValueError: the value is empty, is not finite, or is not a word or a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise LabelValueError("empty")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if not is_unicode(value):
            raise LabelValueError("half of a character (a lone surrogate)")
        return value.strip()
    if isinstance(value, int):
        if class_names is None:
            return str(value)
        if not 0 <= value < len(class_names):
            last = len(class_names) - 1
            raise LabelValueError(f"{value}, and the file names the classes 0 to {last}")
        return class_names[value]
    if isinstance(value, WrittenFloat):
        return value.written
    if isinstance(value, float | Decimal):
        if not (math.isfinite(value) if isinstance(value, float) else value.is_finite()):
            raise LabelValueError(str(value))
        return str(value)
    more = "; task.type: multilabel reads lists of labels" if isinstance(value, list) else ""
    raise LabelValueError(f"a {type(value).__name__}: expected a word or a number{more}")


def value_kind(
    value: Any, class_names: Sequence[str] | None
) -> Literal["text", "boolean", "number"]:
    """Return how the file holds a label, whatever its text is."""
    if class_names is not None or isinstance(value, str):
        return "text"
    return "boolean" if isinstance(value, bool) else "number"


def by_number(texts: Iterable[str]) -> dict[Decimal | str, list[str]]:
    """Group texts by the number that they write; numbers are compared exactly."""
    groups: dict[Decimal | str, list[str]] = {}
    for text in texts:
        value: Decimal | str
        try:
            value = Decimal(text)
        except InvalidOperation:  # an exponent of twenty digits
            value = text
        groups.setdefault(value, []).append(text)
    return groups


def same_number(texts: Iterable[str]) -> list[str] | None:
    """Return the first two texts that write one number, or None."""
    return next((same[:2] for same in by_number(texts).values() if len(same) > 1), None)


def in_id_order(texts: set[str]) -> tuple[str, ...]:
    """Return class names in the order of their ids: by number if all are plain integers."""
    numeric = all(map(is_plain_integer, texts))
    return tuple(sorted(texts, key=Decimal if numeric else None))


def look_alike_note(names: Sequence[str]) -> list[str]:
    """Return a note on classes that a reader may take for one class."""
    groups: dict[str | Decimal, list[str]] = {}
    for name in names:
        key: str | Decimal = unicodedata.normalize("NFKC", name).casefold()
        if is_number(str(key)):
            key = next(iter(by_number([str(key)])))
        else:
            visible = (c for c in str(key) if unicodedata.category(c) not in ("Cc", "Cf"))
            key = " ".join("".join(visible).split())
        groups.setdefault(key, []).append(name)
    alike = [" and ".join(map(ascii, found)) for found in groups.values() if len(found) > 1]
    if not alike:
        return []
    return [
        "classes that differ only in case, spaces, invisible characters or the way a number is "
        f"written: {listed(alike)}"
    ]
