"""Reading records that may be half written: nothing here raises, what is not there is None.

A run that failed leaves half a record, and records can be edited by hand. Reports are made of
both, so every value is fetched through these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line

_DIGITS = 19  # of a number of 64 bits


def dig(data: Any, *keys: str) -> Any:
    """The value under nested keys, or None where a key is missing or its parent no mapping."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def block(data: Any, *keys: str) -> Mapping[str, Any]:
    """As :func:`dig`, but always a mapping; empty where there is none."""
    found = dig(data, *keys)
    return found if isinstance(found, Mapping) else {}


def items(data: Any, *keys: str) -> list[Any]:
    """As :func:`dig`, but always a list; empty where there is none."""
    found = dig(data, *keys)
    return list(found) if isinstance(found, list | tuple) else []


def mappings(data: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The mappings of a list; anything else in it is left out."""
    return [item for item in items(data, *keys) if isinstance(item, Mapping)]


def number(data: Any, *keys: str) -> float | None:
    """A finite number, or None. Booleans are no numbers."""
    found = dig(data, *keys) if keys else data
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        value = float(found)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def numbers(data: Any, *keys: str) -> list[float]:
    """The finite numbers of a list, in order."""
    return [value for value in map(number, items(data, *keys)) if value is not None]


def points(data: Any, x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of a list of mappings, where both are finite numbers."""
    found = []
    for item in data if isinstance(data, list) else []:
        first, second = number(item, x), number(item, y)
        if first is not None and second is not None:
            found.append((first, second))
    return found


def text(data: Any, *keys: str) -> str | None:
    """A string on one line without control characters, or None. Numbers are written out."""
    found = dig(data, *keys) if keys else data
    if found is None or isinstance(found, Mapping | list):
        return None
    if isinstance(found, bool):
        return "yes" if found else "no"
    return printable_line(str(found)) or None


def step_number(key: Any) -> int | None:
    """A step that stands for a key, as JSON has them: ``"100"``; None for what is none."""
    plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < _DIGITS
    return int(key) if plain else None
