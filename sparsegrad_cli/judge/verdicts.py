"""Read the judge's verdicts, summarize them, and look up the grades of answers. Imports no torch.

The summary has means with standard errors, wins, flips and missing verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import ValidationError

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.generate.answer_files import FOLDER
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.judge.prompts import talk
from sparsegrad_cli.judge.tasks import Task
from sparsegrad_cli.records.answers import AnswersRecord, JudgeRow, JudgeVerdict
from sparsegrad_cli.records.store import load
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.answers import side_by_side
from sparsegrad_cli.report.document import SideBySide

VERDICTS = "verdicts.jsonl"
Verdicts = Mapping[str, JudgeVerdict]  # By the key of the task.


def read_verdict(record: Mapping[str, Any]) -> JudgeVerdict | None:
    """Return a line of verdicts.jsonl, or None if it is damaged: the file may come from anyone."""
    try:
        return JudgeVerdict.model_validate(record)
    except ValidationError:
        return None


# --- summary


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, std / sqrt(n); None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def grade_rows(tasks: Sequence[Task], verdicts: Verdicts) -> list[JudgeRow]:
    """Return a row per model, each followed by a row per category.

    A question's grade is the mean over its turns, and a row's ``mean`` is the mean over its
    questions. ``standard_error`` counts questions, since the turns of one question are not
    independent.
    """
    rows = []
    for model in dict.fromkeys(task.models[0] for task in tasks):
        own = [task for task in tasks if task.models[0] == model]
        for category in (None, *_categories(own)):
            part = [t for t in own if category is None or t.question.category == category]
            rows.append(JudgeRow(model=model, category=category, **_grades(part, verdicts)))
    return rows


def _grades(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, Any]:
    by_question: dict[str, list[float]] = {}
    by_turn: dict[int, list[float]] = {}
    for task in tasks:
        grade = verdicts[task.key].verdict
        if isinstance(grade, float):
            by_question.setdefault(str(task.question.id), []).append(grade)
            by_turn.setdefault(task.turn, []).append(grade)
    grades = [math.fsum(values) / len(values) for values in by_question.values()]
    return {
        "mean": _mean(grades),
        "standard_error": _standard_error(grades),
        "questions": len(grades),
        "graded": sum(map(len, by_question.values())),
        "turn_means": [_mean(by_turn.get(turn, [])) for turn in range(_turns(tasks))],
        **_missing(tasks, verdicts),
    }


def pair_rows(tasks: Sequence[Task], verdicts: Verdicts) -> list[JudgeRow]:
    """Return a row for all pairs, then a row per category, from tasks in both orders.

    A model wins a pair if both orders prefer it. If they disagree, the pair is a tie. It is a flip
    if each order preferred a different model, so that the order decided. ``share`` is the first
    model's share of wins, in which a tie counts half. Its standard error counts questions.
    """
    rows = []
    for category in (None, *_categories(tasks)):
        part = [t for t in tasks if category is None or t.question.category == category]
        rows.append(JudgeRow(category=category, **_pairs(part, verdicts)))
    return rows


def _pairs(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, Any]:
    one, other = tasks[0].models
    counts = dict.fromkeys(("wins", "losses", "ties", "flips", "first_flips", "one_order"), 0)
    shares: dict[str, list[float]] = {}
    for forth, back in zip(tasks[::2], tasks[1::2], strict=True):
        said = [verdicts[task.key].verdict for task in (forth, back)]
        if None in said:
            continue
        preferred = {
            _preferred(task, verdict) for task, verdict in zip((forth, back), said, strict=True)
        }
        share = 0.5
        if preferred == {one}:
            counts["wins"], share = counts["wins"] + 1, 1.0
        elif preferred == {other}:
            counts["losses"], share = counts["losses"] + 1, 0.0
        else:
            counts["ties"] += 1
            flipped = preferred == {one, other}
            counts["flips"] += flipped
            counts["first_flips"] += flipped and said == ["A", "A"]
            counts["one_order"] += None in preferred and len(preferred) == 2
        shares.setdefault(str(forth.question.id), []).append(share)
    by_question = [math.fsum(values) / len(values) for values in shares.values()]
    return {
        "models": [one, other],
        "share": _mean(by_question),
        "standard_error": _standard_error(by_question),
        "questions": len(by_question),
        "pairs": sum(map(len, shares.values())),
        **counts,
        **_missing(tasks, verdicts),
    }


def _preferred(task: Task, verdict: object) -> str | None:
    """Return the model that a verdict prefers, or None for a tie."""
    return {"A": task.models[0], "B": task.models[1]}.get(str(verdict))


def _missing(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, int]:
    statuses = [verdicts[task.key].status for task in tasks]
    return {
        "asked": len(tasks),
        "unreadable": statuses.count("unreadable"),
        "failed": statuses.count("failed"),
    }


def _turns(tasks: Iterable[Task]) -> int:
    return max((task.turn + 1 for task in tasks), default=0)


def _categories(tasks: Iterable[Task]) -> list[str]:
    """Return the categories in the order of the questions."""
    return list(dict.fromkeys(t.question.category for t in tasks if t.question.category))


# --- grades of answers


class Grades:
    """The grades of single answers in the files ``judge*/verdicts.jsonl`` of a folder.

    A grade belongs to a question, an answer and the earlier turns, as its prompt quotes them. A
    changed answer has no grade.

    Attributes:
        notes: Notes about files that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self._found: dict[tuple[str, int], list[tuple[str, float, str]]] = {}
        for path in sorted(folder.glob(f"judge*/{VERDICTS}")):
            try:
                records, _ = read_records(path)
            except SparsegradError as error:
                self.notes.append(f"{error.where or path}: {error.what}")
                continue
            for record in records:
                self._keep(read_verdict(record))

    def _keep(self, found: JudgeVerdict | None) -> None:
        if found and found.messages and found.kind == "single" and isinstance(found.verdict, float):
            key = (str(found.question_id), found.turn - 1)
            content = found.messages[-1].get("content", "")
            self._found.setdefault(key, []).append((str(found.judge), found.verdict, content))

    def of(
        self, question_id: Any, turns: Sequence[str], answers: Sequence[str], turn: int
    ) -> dict[str, float]:
        """Return judge -> its last grade of the answer to a turn, counted from 0."""
        told = self._found.get((str(question_id), turn), [])
        parts = talk(turns, answers, turn) if told else []
        return {judge: grade for judge, grade, said in told if all(p in said for p in parts)}


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
    if not files:
        return []
    grades = Grades(study)
    found: list[SideBySide] = []
    for file in files:
        try:
            answers = load(AnswersRecord, file)
        except SparsegradError as error:
            found.append(SideBySide(file.stem, notes=[f"{error.where or file}: {error.what}"]))
        else:
            found += side_by_side(answers, record, grades, grades.notes)
    return found
