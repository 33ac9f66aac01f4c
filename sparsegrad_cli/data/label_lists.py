"""The labels of a row that may have several: lists, texts with separators, columns of 0 and 1.

docs/reference/labels.md has the rules.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.data.label_texts import LabelValueError, label_text
from sparsegrad_cli.io.bounded_json import plain_json

_LONGEST = 100_000  # Characters of a list that is written as text.
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}


def label_list(
    value: Any, separator: str | None, class_names: Sequence[str] | None = None
) -> list[str]:
    """Return the labels of a row, each once, in the order of the cell.

    Args:
        value: a list of labels, or its text: JSON, or a list as Python prints it. With a
            separator, a text holds the labels themselves, and an empty one holds none.
        separator: text between two labels in a cell.
        class_names: names of a column of ClassLabel lists, whose items are ids.

    Raises:
        LabelValueError: it is missing or no list, or an item cannot be a label.
    """
    if isinstance(value, str) and separator is not None:
        parts = [part.strip() for part in value.split(separator)]
        return list(dict.fromkeys(part for part in parts if part))
    items = _parsed(value) if isinstance(value, str) else value
    if items is None:
        raise LabelValueError("missing: write [] for a row without labels")
    if not isinstance(items, list | tuple):
        kind = type(value).__name__
        raise LabelValueError(f"a {kind} ({value!r:.40}): expected a list of labels")
    nested = next((item for item in items if isinstance(item, list | tuple | dict)), None)
    if nested is not None:
        raise LabelValueError(
            f"a list that holds {nested!r:.40}: expected words or numbers in the list"
        )
    return list(dict.fromkeys(label_text(item, class_names) for item in items))


def _parsed(text: str) -> Any:
    """Return the list that a text writes; None for an empty text, the text itself if none."""
    text = text.strip()
    if not text:
        return None
    if not text.startswith("[") or len(text) > _LONGEST:
        return text
    try:
        return plain_json(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)  # As pandas writes a column of lists to CSV.
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def has_label(value: Any) -> bool:
    """Return whether a row has the label of a column of 0 and 1.

    Args:
        value: 0, 1, true or false, also as text.

    Raises:
        LabelValueError: it is something else.
    """
    flag = _FLAGS.get(str(value).strip().lower())
    if flag is None:
        shown = "empty" if value is None or not str(value).strip() else f"{value!r:.40}"
        raise LabelValueError(f"{shown}: expected 0 or 1")
    return flag


def flagged(values: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the names of the columns in which a row has 1.

    Raises:
        LabelValueError: a value is not 0 or 1; names the column.
    """
    found = []
    for column in columns:
        try:
            if has_label(values.get(column)):
                found.append(column)
        except LabelValueError as error:
            raise LabelValueError(f"{error}, in column {column!r}") from None
    return found
