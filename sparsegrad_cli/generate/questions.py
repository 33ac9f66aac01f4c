"""Questions to ask a model: a file in MT-Bench's format, of prompts, of plain lines, or our own.

One JSON object a line: ``question_id``, ``category``, ``turns`` (the user's, in order) and
``reference`` (a right answer a turn) as in MT-Bench's question.jsonl, or ``prompt`` for one turn.
Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DataError, FileFormatError, UsageError
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.paths import expanded

BUILTIN = "builtin:questions"
_SHIPPED = Path(__file__).with_name("questions.jsonl")
_LONGEST = 80  # characters of a word in a file's name, which holds two and has at most 255 bytes
_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn.

    Attributes:
        id: as in the file; a string or a whole number.
        category: None where the file names none.
        turns: of the user, in order; none is empty.
        reference: a right answer to each of the first turns, None where there is none.
    """

    id: str | int
    category: str | None
    turns: tuple[str, ...]
    reference: tuple[str | None, ...] = ()

    def right_answer(self, turn: int) -> str | None:
        """The reference of a turn (0 is the first), if there is one."""
        return self.reference[turn] if turn < len(self.reference) else None


def read_questions(source: str) -> list[Question]:
    """The questions of a file, or of ``builtin:questions``, in order.

    A ``.txt`` file holds plain text, a prompt a line; in a file of another name a first line that
    begins with a brace says that it holds JSON.

    Raises:
        UsageError: no such file.
        FileFormatError: a line is no JSON, or the file no text.
        DataError: a line is no question, an id is there twice, or there is no question at all.
    """
    path = _SHIPPED if source == BUILTIN else expanded(source)
    if source.startswith("builtin:") and source != BUILTIN:
        raise UsageError(f"unknown built-in questions {source!r}", fix=f"there is {BUILTIN}")
    questions = _plain(path) if _is_plain(path) else _from_json(path)
    if not questions:
        raise DataError(f"{source} holds no question", where=source)
    seen: set[str] = set()
    for question in questions:
        if str(question.id) in seen:
            raise DataError(f"question_id {question.id!r} is there twice", where=source)
        seen.add(str(question.id))
    return questions


def questions_name(source: str) -> str:
    """``questions`` of builtin:questions or of a/questions.jsonl: part of a file's name."""
    return file_word(Path(source.removeprefix("builtin:")).stem) or "questions"


def file_word(text: str) -> str:
    """Text, or its end, as part of a file's name: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", text)[-_LONGEST:].strip("-.")


def _is_plain(path: Path) -> bool:
    if path.suffix.lower() in _JSON:
        return False
    return path.suffix.lower() == ".txt" or not _text(path).lstrip().startswith("{")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"the questions {path} cannot be read: {error.strerror or error}",
            fix=f"name a file, or {BUILTIN}",
        ) from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"is no UTF-8 text: {error}", where=str(path)) from error


def _plain(path: Path) -> list[Question]:
    lines = [line.strip() for line in _text(path).split("\n")]
    return [Question(n, None, (line,)) for n, line in enumerate(lines, start=1) if line]


def _from_json(path: Path) -> list[Question]:
    _text(path)  # says what is wrong with a file that cannot be read
    records, torn = read_records(path)
    if torn:
        raise FileFormatError("the last line is torn, or no JSON object", where=str(path))
    return [_question(r, n, f"{path}, question {n}") for n, r in enumerate(records, start=1)]


def _question(record: Mapping[str, Any], number: int, where: str) -> Question:
    turns = record.get("turns", record.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not _texts(turns) or not turns:
        raise DataError(
            "a question needs `turns`, a list of texts, or `prompt`, one text; none may be empty",
            where=where,
            fix='{"question_id": 1, "category": "writing", "turns": ["..."]}',
        )
    name = record.get("question_id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError("question_id is neither a text nor a whole number", where=where)
    category = record.get("category")
    if category is not None and not isinstance(category, str):
        raise DataError("category is no text", where=where)
    reference = record.get("reference") or ()
    reference = [reference] if isinstance(reference, str) else reference
    if not _texts(reference, empty=True) or len(reference) > len(turns):
        raise DataError("reference is a list of texts, at most one a turn", where=where)
    return Question(name, category, tuple(turns), tuple(text or None for text in reference))


def _texts(found: Any, *, empty: bool = False) -> bool:
    """A list of texts that say something and can be written down; ``empty``: or of nothing."""
    if not isinstance(found, list | tuple):
        return False
    said = [text for text in found if text or not empty]
    return all(isinstance(text, str) and text.strip() and _encodes(text) for text in said)


def _encodes(text: str) -> bool:
    """JSON can hold half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
