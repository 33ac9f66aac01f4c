"""Reading a judge's reply. What cannot be read is no verdict: nothing is guessed."""

from __future__ import annotations

import re
from typing import Any

LOWEST, HIGHEST = 1.0, 10.0
_BRACKETS = re.compile(r"\[\[([^\[\]]{1,20})\]\]")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def parse_rating(reply: str) -> float | None:
    """The grade, from 1 to 10, or None.

    That of the last line where this holds one and nothing else but its label; otherwise the only
    one in the reply. A reply with several different ones says nothing certain.
    """
    found = _verdict(reply, "rating")
    if found is None or not _NUMBER.fullmatch(found):
        return None
    grade = float(found)
    return grade if LOWEST <= grade <= HIGHEST else None


def is_grade(value: Any) -> bool:
    """Whether a value read from a file is a grade."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return LOWEST <= value <= HIGHEST


def parse_winner(reply: str) -> str | None:
    """``A``, ``B`` or ``C`` (neither is better), or None; read as :func:`parse_rating` does."""
    found = _verdict(reply, "winner")
    return found.upper() if found is not None and found.upper() in ("A", "B", "C") else None


def _verdict(reply: str, label: str) -> str | None:
    """What stands in the double brackets that count."""
    lines = [line for line in reply.splitlines() if line.strip()]
    last = _found(lines[-1]) if lines else []
    if len(last) == 1 and set(_words(_BRACKETS.sub("", lines[-1]))) <= {label}:
        return last[0]
    everywhere = set(_found(reply))
    return everywhere.pop() if len(everywhere) == 1 else None


def _found(text: str) -> list[str]:
    return [inner.strip() for inner in _BRACKETS.findall(text)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
