"""JSON of any depth, and files of JSON records with their places."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.text_files import read_text, text_lines
from sparsegrad_cli.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = json.JSONDecoder().raw_decode  # does not recurse at a string, number or literal


class WrittenFloat(float):
    """A JSON number that keeps its text: 1.1 and 1.10 are equal, and two texts."""

    written: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Make the number from the text of the file."""
        number = super().__new__(cls, text)
        number.written = text
        return number


def parse_json(text: str, *, as_written: bool = False) -> Any:
    """``json.loads``, but for nesting of any depth: a chain of replies may be thousands deep.

    Args:
        text: one JSON value.
        as_written: make every number with a fraction or an exponent, and ``-0``, a
            :class:`WrittenFloat`. A value that is nested too deeply for ``json`` has plain floats.

    Raises:
        ValueError: it is not JSON (json.JSONDecodeError, which says where), or a number has too
            many digits.
    """
    hooks: dict[str, Any] = {}
    if as_written:
        hooks = {"parse_float": WrittenFloat, "parse_int": _written_int}
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        return _parse_deep(text)


def _written_int(text: str) -> int | WrittenFloat:
    return WrittenFloat(text) if text == "-0" else int(text)


def fault_of(error: ValueError) -> str:
    """What parse_json complains of, with the column where it is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error).split(";")[0]


@dataclass(frozen=True)
class Record:
    """One value of a JSON file: ``row`` counts from 1, ``line`` is None in an array."""

    value: Any
    path: Path
    row: int
    line: int | None

    @property
    def place(self) -> str:
        """``file:line`` where lines are known, else ``file, row n``."""
        if self.line is not None:
            return f"{self.path}:{self.line}"
        return f"{self.path}, row {self.row}"


def json_records(path: Path, *, as_written: bool = False) -> Iterator[Record]:
    """Every line of a JSON-lines file, or every item of a file that is one array; gzip or plain.

    Blank lines are skipped. Values need not be objects. Lines are read one by one, an array whole.
    ``as_written`` is that of :func:`parse_json`.

    Raises:
        DataError: it cannot be read (text_files), or something is not JSON; names file and line.
    """
    start = next((line for _, line in text_lines(path) if line.strip()), "")
    values = _whole_array(path, as_written) if start.lstrip().startswith("[") else None
    if values is not None:
        for row, value in enumerate(values, start=1):
            yield Record(value, path, row, None)
        return
    row = 0
    for number, line in text_lines(path):
        if line.strip():
            row += 1
            try:
                value = parse_json(line, as_written=as_written)
            except ValueError as error:
                raise DataError(
                    f"not JSON: {fault_of(error)}",
                    where=f"{path}:{number}",
                    fix="one object a line, or one array of objects",
                ) from None
            yield Record(value, path, row, number)


def _whole_array(path: Path, as_written: bool) -> list[Any] | None:
    """The file's array; None where more follows it, so that it is only the first line's value."""
    try:
        values: list[Any] = parse_json(read_text(path), as_written=as_written)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except ValueError as error:
        raise DataError(f"not JSON: {fault_of(error)}", where=str(path)) from None
    return values


def _parse_deep(text: str) -> Any:
    """As json.loads, with a list for a stack instead of the interpreter's."""
    open_: list[tuple[Any, str]] = []  # containers that are not closed yet, with the key in hand
    at = _skip(text, 0)
    while True:
        mark = text[at : at + 1]
        if mark in ("[", "{"):
            container: Any = [] if mark == "[" else {}
            at = _skip(text, at + 1)
            if text[at : at + 1] != _closing(container):
                key, at = _key(text, at) if mark == "{" else ("", at)
                open_.append((container, key))
                continue
            value, at = container, at + 1
        else:
            value, at = _SCALAR(text, at)
        while open_:  # the value is whole: hang it up, and close what ends with it
            container, key = open_.pop()
            if isinstance(container, dict):
                container[key] = value
            else:
                container.append(value)
            at = _skip(text, at)
            mark = text[at : at + 1]
            if mark == ",":
                at = _skip(text, at + 1)
                key, at = _key(text, at) if isinstance(container, dict) else ("", at)
                open_.append((container, key))
                break
            if mark != _closing(container):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            value, at = container, at + 1
        else:
            if _skip(text, at) != len(text):
                raise json.JSONDecodeError("Extra data", text, _skip(text, at))
            return value


def _closing(container: Any) -> str:
    return "}" if isinstance(container, dict) else "]"


def _key(text: str, at: int) -> tuple[str, int]:
    """A member's name and where its value begins."""
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    key, at = _SCALAR(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
    return key, _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
