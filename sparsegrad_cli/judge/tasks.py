"""Group answers by model and make the judge's tasks: one prompt per turn, or two per pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.questions import Question
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.generate.answer_files import check_line
from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.judge.prompts import Messages, choosing_prompt, grading_prompt


@dataclass
class Answered:
    """The answers of one model with one set of settings.

    Attributes:
        label: The name in tables, unique among the groups.
        file: The file that the answers are in.
        digest: Digest of the weights, if the file has one.
        settings: Settings of generation, if the file has them.
        answers: Question id -> answer to each turn.
    """

    label: str
    file: str
    digest: str | None
    settings: Mapping[str, Any] | None
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_answers(
    paths: Sequence[Path], questions: Sequence[Question]
) -> tuple[list[Answered], list[str]]:
    """Read files of answers; the last of several answers to a question is used.

    Returns:
        The groups in the order of the files, and notes for the user.

    Raises:
        UsageError, FileFormatError: A file cannot be read, or a line is not an answer.
        DataError: A line answers a question that is not in ``questions`` or is worded differently
            there; or a file is empty.
    """
    by_id = {str(question.id): question for question in questions}
    groups: dict[tuple[str, str, str], Answered] = {}
    notes = []
    for path in paths:
        records, torn = read_records(path)
        if torn:
            notes.append(f"{path}: the last line is incomplete and is ignored")
        if not records:
            raise DataError(f"{path} holds no answers", where=str(path))
        for number, record in enumerate(records, start=1):
            line = check_line(record, f"{path}:{number}")
            name, answers = str(line.question_id), tuple(line.answers)
            _check_answers(name, record, answers, by_id, f"{path}:{number}")
            settings = record.get("settings")
            label = line.model if line.model and line.model.strip() else path.stem
            key = (label, str(line.digest), repr(settings))
            group = groups.setdefault(key, Answered(label, str(path), line.digest, settings))
            group.answers[name] = answers
    found = list(groups.values())
    _make_labels_unique(found)
    for group in found:
        missing = len(by_id.keys() - group.answers.keys())
        if missing:
            notes.append(f"{group.label}: {missing} of {len(by_id)} questions have no answer")
    return found, notes


def _check_answers(
    name: str,
    record: Mapping[str, Any],
    answers: Sequence[str],
    questions: Mapping[str, Question],
    where: str,
) -> None:
    """Refuse answers to a question that differs from the one with this id."""
    if name not in questions:
        raise DataError(
            f"--questions has no question {name!r}, which is answered here", where=where
        )
    turns = list(questions[name].turns)
    if record.get("turns", turns) != turns:
        raise DataError(
            f"question {name!r} is worded differently in --questions",
            where=where,
            fix="judge with the file from which the answers were generated",
        )
    if len(answers) != len(turns):
        raise DataError(
            f"expected {len(turns)} answers to question {name!r}, one per turn, got {len(answers)}",
            where=where,
        )


def _make_labels_unique(groups: Sequence[Answered]) -> None:
    """Add the file, the weights or a number to labels that several groups have."""
    labels = [group.label for group in groups]
    for label in {label for label in labels if labels.count(label) > 1}:
        same = [group for group in groups if group.label == label]
        stems = [Path(group.file).stem for group in same]
        digests = [str(group.digest)[:8] for group in same]
        numbers = [str(number) for number in range(1, len(same) + 1)]
        marks = next(m for m in (stems, digests, numbers) if len(set(m)) == len(same))
        for group, mark in zip(same, marks, strict=True):
            group.label = f"{label} ({mark})"


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        key: sha256 (hex) of the judge's name and the prompt.
        question: The question that was answered.
        turn: The turn that is judged, counted from 0.
        models: The label of the graded model, or the labels of A and B of a pair.
        messages: The prompt.
    """

    key: str
    question: Question
    turn: int
    models: tuple[str, ...]
    messages: Messages

    @property
    def pairwise(self) -> bool:
        """Whether two answers are compared."""
        return len(self.models) == 2

    def record(self) -> dict[str, Any]:
        """Return the task's part of a line in verdicts.jsonl."""
        return {
            "key": self.key,
            "kind": "pair" if self.pairwise else "single",
            "question_id": self.question.id,
            "category": self.question.category,
            "turn": self.turn + 1,
            "models": list(self.models),
            "messages": self.messages,
        }


def single_tasks(
    questions: Sequence[Question], groups: Sequence[Answered], judge: str
) -> list[Task]:
    """Return a task for every turn of every answered question, model by model."""
    tasks = []
    for group in groups:
        for question, turn in _turns(questions, (group,)):
            answers = group.answers[str(question.id)]
            messages = grading_prompt(question, answers, turn)
            tasks.append(_task(question, turn, (group.label,), messages, judge))
    return tasks


def pair_tasks(questions: Sequence[Question], groups: Sequence[Answered], judge: str) -> list[Task]:
    """Return two tasks, one per order, for every turn of every question that both answered.

    Raises:
        UsageError: There are not exactly two groups.
    """
    if len(groups) != 2:
        names = ", ".join(group.label for group in groups)
        raise UsageError(
            f"--pairwise compares two models, got {len(groups)}: {names}",
            fix="two files of answers, each of one model with one set of settings",
        )
    tasks = []
    for question, turn in _turns(questions, groups):
        for first, second in (groups, groups[::-1]):
            name = str(question.id)
            messages = choosing_prompt(question, first.answers[name], second.answers[name], turn)
            tasks.append(_task(question, turn, (first.label, second.label), messages, judge))
    return tasks


def _turns(
    questions: Sequence[Question], groups: Sequence[Answered]
) -> Iterator[tuple[Question, int]]:
    """Yield every turn of the questions that all groups answered."""
    for question in questions:
        if all(str(question.id) in group.answers for group in groups):
            for turn in range(len(question.turns)):
                yield question, turn


def _task(
    question: Question, turn: int, models: tuple[str, ...], messages: Messages, judge: str
) -> Task:
    content = json.dumps({"judge": judge, "messages": messages}, sort_keys=True)
    return Task(hashlib.sha256(content.encode()).hexdigest(), question, turn, models, messages)
