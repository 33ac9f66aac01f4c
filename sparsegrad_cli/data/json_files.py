"""JSON of any depth, and files of JSON records with their places."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.text_files import read_text, text_lines
from sparsegrad_cli.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")


class WrittenFloat(float):
    """A JSON number that keeps its text: 1.1 and 1.10 are equal, and two texts."""

    written: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Make the number from the text of the file."""
        number = super().__new__(cls, text)
        number.written = text
        return number


class RepeatedKeys(dict[str, Any]):
    """A JSON object that writes some keys twice; of each it holds the last value.

    Attributes:
        repeated: those keys.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        times = Counter(key for key, _ in pairs)
        self.repeated = tuple(key for key, count in times.items() if count > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def _integer(digits: str) -> int | Decimal:
    """Return a whole number; exact, but no int, where it has more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


# Does not recurse at a string, number or literal.
_SCALAR = json.JSONDecoder(parse_int=_integer).raw_decode


def parse_json(text: str, *, as_written: bool = False) -> Any:
    """Return what ``json.loads`` does, for nesting of any depth and numbers of any length.

    Args:
        text: one JSON value.
        as_written: make every number with a fraction or an exponent, and ``-0``, a
            :class:`WrittenFloat`, and an object that writes a key twice a :class:`RepeatedKeys`.
            A value that is nested too deeply for ``json`` has plain floats and objects.

    Raises:
        json.JSONDecodeError: it is not JSON; says where.
    """
    try:
        if as_written:
            return json.loads(
                text,
                parse_float=WrittenFloat,
                parse_int=_written_integer,
                object_pairs_hook=_object,
            )
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of thousands of digits
            return json.loads(text, parse_int=_integer)
    except RecursionError:
        return _parse_deep(text)


def _written_integer(text: str) -> int | float | Decimal:
    return WrittenFloat(text) if text == "-0" else _integer(text)


def fault_of(error: json.JSONDecodeError) -> str:
    """Return what parse_json complains of, with the column."""
    return f"{error.msg} at column {error.colno}"


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
    """Yield every line of a JSON-lines file, or every item of a file that is one array.

    A file that is one object is one record, or, where the object has a list named ``data``, the
    items of that list. Blank lines are skipped. Values need not be objects. Lines are read one by
    one, an array or an object over several lines whole. ``as_written`` is that of
    :func:`parse_json`.

    Raises:
        DataError: it cannot be read (text_files), or something is not JSON; names file and line.
    """
    start = next((line for _, line in text_lines(path) if line.strip()), "")
    array = start.lstrip().startswith("[")
    if array or (start.lstrip().startswith("{") and not _is_json(start)):
        whole = _whole(path, as_written, one_value=not array)
        if whole is not None:
            yield from _items(whole, path)
            return
    lines = _lines(path, as_written)
    first = list(islice(lines, 2))
    if len(first) == 1 and _is_wrapped(first[0].value):
        yield from _items(first[0].value, path)
        return
    yield from first
    yield from lines


def _lines(path: Path, as_written: bool) -> Iterator[Record]:
    row = 0
    for number, line in text_lines(path):
        if line.strip():
            row += 1
            try:
                value = parse_json(line, as_written=as_written)
            except json.JSONDecodeError as error:
                raise _not_json(error, f"{path}:{number}") from None
            yield Record(value, path, row, number)


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def _first_keys(value: Any) -> set[str]:
    """Return the keys of the first object in a list; empty for anything but a list of objects."""
    first = value[0] if isinstance(value, list) and value else None
    return set(first) if isinstance(first, dict) else set()


def _items(value: Any, path: Path) -> Iterator[Record]:
    """Yield the records of a file that is one array or object."""
    if _is_wrapped(value):
        rows = _first_keys(value["data"])
        lists = [key for key, held in value.items() if key == "data" or _first_keys(held) & rows]
        if len(lists) > 1:
            raise DataError(
                f"Expected one list of rows in the object, got {', '.join(lists)}",
                where=str(path),
                fix="put each list into a file of its own",
            )
    items = value["data"] if _is_wrapped(value) else value
    items = items if isinstance(items, list) else [items]
    return (Record(item, path, row, None) for row, item in enumerate(items, start=1))


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except json.JSONDecodeError:
        return False
    return True


def _whole(path: Path, as_written: bool, *, one_value: bool) -> Any:
    """Return the file as one value; None where more follows an array, the first line's value."""
    try:
        return parse_json(read_text(path), as_written=as_written)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and not one_value:
            return None
        raise _not_json(error, f"{path}:{error.lineno}") from None


def _not_json(error: json.JSONDecodeError, where: str) -> DataError:
    return DataError(
        f"not JSON: {fault_of(error)}",
        where=where,
        fix="one object a line, or one array of objects",
    )


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
