"""Read questions: a file in the format of MT-Bench, prompts, plain lines, or the built-in ones.

A JSON line has ``question_id``, ``category``, ``turns`` (the user's, in order) and ``reference`` (a
right answer per turn), as in MT-Bench's question.jsonl; or ``prompt`` for a single turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from sparsegrad_cli.errors import DataError, FileFormatError, UsageError
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.records.base import problems

BUILTIN = "builtin:questions"
_SHIPPED = Path(__file__).with_name("questions.jsonl")
_MAX_WORD = 80  # Characters; a file name holds two words and has at most 255 bytes.
_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: The id in the file.
        category: None if the file names none.
        turns: The user's turns, in order; none is empty.
        reference: A right answer to each of the first turns, or None.
    """

    id: str | int
    category: str | None
    turns: tuple[str, ...]
    reference: tuple[str | None, ...] = ()

    def right_answer(self, turn: int) -> str | None:
        """Return the reference of a turn, counted from 0, if there is one."""
        return self.reference[turn] if turn < len(self.reference) else None


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text


def _encodable(text: str) -> str:
    """Refuse a lone surrogate, which JSON can contain but tokenizers do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in Unicode") from None
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


_Encodable = Annotated[str, AfterValidator(_encodable)]
_Text = Annotated[_Encodable, AfterValidator(_not_empty)]
_ListOrText = BeforeValidator(_as_list)


class _Line(BaseModel):
    """One JSON line."""

    model_config = ConfigDict(strict=True, extra="ignore")

    question_id: str | int | None = None
    category: str | None = None
    turns: Annotated[list[_Text], _ListOrText] = []
    prompt: _Text | None = None
    reference: Annotated[list[_Encodable | None], _ListOrText] = []

    def question(self, number: int) -> Question:
        """Return the question; its number in the file is the default id.

        Raises:
            ValueError: It has no turns, or more references than turns.
        """
        turns = self.turns or ([self.prompt] if self.prompt is not None else [])
        if not turns:
            raise ValueError("expected `turns`, a list of texts, or `prompt`, one text")
        if len(self.reference) > len(turns):
            raise ValueError(
                f"expected at most one reference per turn, got {len(self.reference)} for "
                f"{len(turns)} turns"
            )
        name = number if self.question_id is None else self.question_id
        right = tuple(text if text and text.strip() else None for text in self.reference)
        return Question(name, self.category, tuple(turns), right)


def read_questions(source: str) -> list[Question]:
    """Read the questions of a file, or ``builtin:questions``, in order.

    A ``.txt`` file holds one prompt per line. A file with an unknown suffix holds JSON if its first
    character is a brace, else prompts.

    Raises:
        UsageError: The file does not exist.
        FileFormatError: A line is not JSON, or the file is not UTF-8.
        DataError: A line is not a question, two have the same id, or there are none.
    """
    path = _SHIPPED if source == BUILTIN else expanded(source)
    if source.startswith("builtin:") and source != BUILTIN:
        raise UsageError(f"unknown built-in questions {source!r}", fix=BUILTIN)
    content = _read(path)
    questions = _plain(content) if _is_plain(path, content) else _from_json(path)
    if not questions:
        raise DataError(f"{source} holds no questions", where=source)
    seen: set[str] = set()
    for question in questions:
        if str(question.id) in seen:
            raise DataError(f"two questions have the question_id {question.id!r}", where=source)
        seen.add(str(question.id))
    return questions


def read_prompts(prompts: str | tuple[str, ...]) -> list[str]:
    """Return the prompts of a recipe: the listed ones, or those of the file that it names.

    Raises:
        UsageError, FileFormatError, DataError: The file cannot be read or holds no prompts.
        UsageError: A question in it has several turns.
    """
    if not isinstance(prompts, str):
        return list(prompts)
    found = read_questions(prompts)
    several = next((question for question in found if len(question.turns) > 1), None)
    if several is not None:
        raise UsageError(
            f"expected one turn in each question, got {len(several.turns)} in question "
            f"{several.id}: {prompts}",
            where="train.sample_prompts",
            fix="name a file with one prompt a line",
        )
    return [question.turns[0] for question in found]


def questions_name(source: str) -> str:
    """Return the name for file names: ``questions`` for builtin:questions or a/questions.jsonl."""
    return file_word(Path(source.removeprefix("builtin:")).stem) or "questions"


def file_word(text: str) -> str:
    """Return the end of a text as part of a file name: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", text)[-_MAX_WORD:].strip("-.")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"cannot read the questions {path}: {error.strerror or error}",
            fix=f"name a file, or {BUILTIN}",
        ) from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"is not UTF-8: {error}", where=str(path)) from error


def _is_plain(path: Path, content: str) -> bool:
    suffix = path.suffix.lower()
    return suffix not in _JSON and (suffix == ".txt" or not content.lstrip().startswith("{"))


def _plain(content: str) -> list[Question]:
    lines = [line.strip() for line in content.split("\n")]
    return [Question(n, None, (line,)) for n, line in enumerate(lines, start=1) if line]


def _from_json(path: Path) -> list[Question]:
    records, torn = read_records(path)
    if torn:
        raise FileFormatError("the last line is incomplete, or not a JSON object", where=str(path))
    questions = []
    for number, record in enumerate(records, start=1):
        try:
            questions.append(_Line.model_validate(record).question(number))
        except ValueError as error:
            found = problems(error) if isinstance(error, ValidationError) else str(error)
            raise DataError(
                f"is not a question: {found}",
                where=f"{path}, question {number}",
                fix='{"question_id": 1, "category": "writing", "turns": ["..."]}',
            ) from error
    return questions
