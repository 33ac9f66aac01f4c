"""Look up the grades of answers by the graded text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.generate.side_by_side import FOLDER
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.judge.endpoint import DECIDED
from sparsegrad_cli.judge.prompts import is_grade, talk
from sparsegrad_cli.records.answers import AnswersRecord
from sparsegrad_cli.records.store import read_object, validated
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.answers import side_by_side
from sparsegrad_cli.report.document import SideBySide

VERDICTS = "verdicts.jsonl"


class Grades:
    """The grades of single answers in ``judge*/verdicts.jsonl`` of some folders.

    A grade belongs to a question, an answer and the earlier turns, as its prompt quotes them. A
    changed answer has no grade.

    Attributes:
        notes: Notes about files that cannot be read.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.notes: list[str] = []
        self._found: dict[tuple[str, int], list[tuple[str, float, str]]] = {}
        for folder in folders:
            for path in sorted(folder.glob(f"judge*/{VERDICTS}")):
                try:
                    records, _ = read_records(path)
                except SparsegradError as error:
                    self.notes.append(f"{error.where or path}: {error.what}")
                    continue
                for record in records:
                    self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        """Keep the grade in a line, if it has one."""
        grade, turn, judge = record.get("verdict"), record.get("turn"), record.get("judge")
        if record.get("status") != DECIDED or record.get("kind") != "single":
            return
        content = _shown(record)
        if content is None or not is_grade(grade) or not isinstance(turn, int):
            return
        key = (str(record.get("question_id")), turn - 1)
        self._found.setdefault(key, []).append((str(judge), float(grade or 0), content))

    def of(
        self, question_id: Any, turns: Sequence[str], answers: Sequence[str], turn: int
    ) -> dict[str, float]:
        """Return judge -> its last grade of the answer to a turn, counted from 0."""
        told = self._found.get((str(question_id), turn), [])
        parts = talk(turns, answers, turn) if told else []
        return {judge: grade for judge, grade, said in told if all(p in said for p in parts)}


def _shown(record: Mapping[str, Any]) -> str | None:
    """Return the prompt that the judge was shown."""
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, Mapping) else None
    return content if isinstance(content, str) else None


def read_graded_answers(study: Path, record: StudyRecord) -> list[SideBySide]:
    """Read the answers of a study's models, with the grades of the answers.

    Args:
        study: the folder of the study.
        record: its compare.json.

    Returns:
        One object for each file of questions and task. A file that cannot be read is named in a
        note.
    """
    files = sorted((study / FOLDER).glob("*.json"))
    grades = Grades([study] if files else [])
    found: list[SideBySide] = []
    for file in files:
        try:
            answers = validated(AnswersRecord, read_object(file), file)
        except SparsegradError as error:
            found.append(SideBySide(file.stem, notes=[f"{error.where or file}: {error.what}"]))
        else:
            found += side_by_side(answers, record, grades, grades.notes)
    return found
