"""Suggest the name that a user probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def suggest(given: str, choices: Sequence[str], most: int = 20) -> str:
    """Return ``did you mean X?`` if a choice is similar to ``given``, then ``most`` choices."""
    near, some = did_you_mean(given, choices), listed(choices, most)
    return f"{near} Choose one of: {some}" if near else f"choose one of: {some}"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return the first ``most`` names for a message, and the number of the others.

    A name with a comma, or without a letter that shows, is quoted.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(separable, names[:most])) + more


def separable(name: str) -> str:
    """Return a name as it is, or quoted where a list of names would not show its ends."""
    return repr(name) if "," in name or name != name.strip() or not name else name


def did_you_mean(given: str, choices: Sequence[str]) -> str | None:
    """Return ``did you mean X?`` for the most similar choice, or None if none is similar."""
    found = nearest(given, choices)
    return f"did you mean {found}?" if found else None


def nearest(given: str, choices: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """Return the most similar choice, ignoring case and prefixes such as ``glue/``.

    Args:
        given: what the user wrote.
        choices: the names that exist.
        cutoff: smallest similarity, from 0 to 1 (``difflib.get_close_matches``).
    """
    forms = {re.split("[/:]", choice)[-1].lower(): choice for choice in choices}
    forms |= {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(given.lower(), list(forms), n=1, cutoff=cutoff)
    return forms[found[0]] if found else None
