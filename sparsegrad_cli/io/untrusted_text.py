"""Make text from files and servers safe to print on a terminal."""

from __future__ import annotations

import unicodedata

# Embeddings, overrides and isolates: they reverse the direction of the text that follows.
_BIDI_MARKS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def printable_text(raw: str) -> str:
    """Return text of several lines in which nothing controls the terminal.

    Control characters become their pictures (ESC becomes ␛). Control characters without a picture,
    bidirectional marks and lone surrogates become U+FFFD. Line breaks and tabs stay.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else _picture(c) for c in raw)


def printable_line(raw: str) -> str:
    """Return text on one line: white space and control characters become single spaces.

    Bidirectional marks and lone surrogates become U+FFFD.
    """
    return " ".join((raw if raw.isprintable() else "".join(map(_spaced, raw))).split())


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return "\ufffd" if _kind(character) in ("Cc", "Cs") else character


def _spaced(character: str) -> str:
    return {"Cc": " ", "Cs": "\ufffd"}.get(_kind(character), character)


def _kind(character: str) -> str:
    """Return the Unicode category; bidirectional marks count as surrogates (``Cs``)."""
    turns = unicodedata.bidirectional(character) in _BIDI_MARKS
    return "Cs" if turns else unicodedata.category(character)
