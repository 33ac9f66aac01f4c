"""Read files of JSON records, with the place of each record."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsegrad_cli.data.tables import Columns, Table
from sparsegrad_cli.data.text_files import read_text, text_lines
from sparsegrad_cli.errors import DataError


class WrittenFloat(float):
    """A JSON number that keeps its text: 1.1 and 1.10 are equal numbers and different texts.

    Attributes:
        written: the text in the file.
    """

    written: str

    def __new__(cls, text: str) -> WrittenFloat:
        """Make the number from its text in the file."""
        number = super().__new__(cls, text)
        number.written = text
        return number


class RepeatedKeys(dict[str, Any]):
    """A JSON object that has some keys twice; it holds the last value of each.

    Attributes:
        repeated: those keys.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        times = Counter(key for key, _ in pairs)
        self.repeated = tuple(key for key, count in times.items() if count > 1)


class Record(NamedTuple):
    """One value of a JSON file.

    Attributes:
        value: the parsed value.
        place: ``file:line`` if lines are known, else ``file, row n`` (counted from 1).
        line: its line; None in a file that is one array or object.
    """

    value: Any
    place: str
    line: int | None = None


def parse_json(text: str) -> Any:
    """Parse JSON; numbers keep their text, and objects know their repeated keys.

    A number with a fraction or an exponent, and ``-0``, is a :class:`WrittenFloat`. An integer with
    more digits than Python converts is a Decimal. An object with a repeated key is a
    :class:`RepeatedKeys`.

    Raises:
        json.JSONDecodeError: the text is not JSON.
        RecursionError: the value is nested about a thousand levels deep.
    """
    return json.loads(text, parse_float=WrittenFloat, parse_int=_integer, object_pairs_hook=_object)


def json_records(path: Path) -> Iterator[Record]:
    """Yield every line of a JSON-lines file, or every item of a file that is one array.

    A file that is one object is one record, or, if the object has a list named ``data``, the items
    of that list. Blank lines are skipped. JSON lines are read one at a time.

    Raises:
        DataError: the file cannot be read, or a value is not JSON or nested too deeply; names the
            file and the line.
    """
    start = next((line for _, line in text_lines(path) if line.strip()), "")
    is_array = start.lstrip().startswith("[")
    if is_array or (start.lstrip().startswith("{") and not _is_json(start)):
        try:
            yield from _items(_parse(read_text(path), str(path)), path)
            return
        except json.JSONDecodeError as error:
            # An array that is followed by more is the first of several JSON lines.
            if error.msg != "Extra data" or not is_array:
                raise _not_json(error, f"{path}:{error.lineno}") from None
    lines = _lines(path)
    first = list(islice(lines, 2))
    if len(first) == 1 and _has_data_list(first[0].value):
        yield from _items(first[0].value, path)
        return
    yield from first
    yield from lines


def read_json_table(path: Path) -> Table:
    """Read a file of JSON objects as a table; a repeated key is refused on first use.

    Raises:
        DataError: as :func:`json_records`, or a record is not an object.
    """
    records = list(json_records(path))
    names: dict[str, None] = {}
    repeated: dict[str, str] = {}  # key -> place of the first object that has it twice
    for record in records:
        if not isinstance(record.value, dict):
            raise DataError(
                f"expected an object with named fields, found {type(record.value).__name__}",
                where=record.place,
            )
        names.update(dict.fromkeys(record.value))
        if isinstance(record.value, RepeatedKeys):
            repeated = {**dict.fromkeys(record.value.repeated, record.place), **repeated}
    columns = Columns({name: partial(_values, records, name) for name in names}, repeated)
    lines = [record.line for record in records if record.line is not None]
    return Table(columns, str(path), lines or None, count=len(records), ragged=True)


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [record.value.get(name) for record in records]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def _integer(text: str) -> int | float | Decimal:
    if text == "-0":
        return WrittenFloat(text)
    try:
        return int(text)
    except ValueError:  # more digits than Python converts
        return Decimal(text)


def _lines(path: Path) -> Iterator[Record]:
    for number, line in text_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = _parse(line, where)
            except json.JSONDecodeError as error:
                raise _not_json(error, where) from None
            yield Record(value, where, number)


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except RecursionError:
        raise DataError(
            "Expected JSON that is nested at most about 1000 levels deep, got deeper nesting",
            where=where,
            fix="flatten it; a long conversation tree can be written as one message a line, each "
            "with message_id and parent_id",
        ) from None


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return True
    return True


def _has_data_list(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def _first_keys(value: Any) -> set[str]:
    """Return the keys of the first object in a list; empty for anything but a list of objects."""
    first = value[0] if isinstance(value, list) and value else None
    return set(first) if isinstance(first, dict) else set()


def _items(value: Any, path: Path) -> Iterator[Record]:
    """Yield the records of a file that is one array or object."""
    if _has_data_list(value):
        keys = _first_keys(value["data"])
        lists = [key for key, held in value.items() if key == "data" or _first_keys(held) & keys]
        if len(lists) > 1:
            raise DataError(
                f"Expected one list of rows in the object, got {', '.join(lists)}",
                where=str(path),
                fix="put each list into a file of its own",
            )
        value = value["data"]
    items = value if isinstance(value, list) else [value]
    for row, item in enumerate(items, start=1):
        yield Record(item, f"{path}, row {row}")


def _not_json(error: json.JSONDecodeError, where: str) -> DataError:
    return DataError(
        f"not JSON: {error.msg} at column {error.colno}",
        where=where,
        fix="write one object a line, or one array of objects",
    )
