"""Answers to be judged, as ``sparsegrad generate`` writes them, one group a model and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DataError, FileFormatError
from sparsegrad_cli.generate.questions import Question
from sparsegrad_cli.io.jsonl import read_records


@dataclass
class Answered:
    """What one model, with one set of settings, answered.

    Attributes:
        label: its name in tables; no two groups share one.
        file: where the answers stand.
        digest: of the weights, where the file says.
        settings: of generation, where the file says.
        answers: question id -> answer to each turn.
    """

    label: str
    file: str
    digest: str | None
    settings: Mapping[str, Any] | None
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_answers(
    paths: Sequence[Path], questions: Sequence[Question]
) -> tuple[list[Answered], list[str]]:
    """The groups in the order of the files, and what the user should know of them.

    A question answered twice in a group counts with its last answer.

    Raises:
        UsageError, FileFormatError: a file cannot be read; see :func:`read_records`.
        DataError: a line is no answer, answers a question that is not among ``questions``, or was
            asked with other words; or a file holds nothing.
    """
    asked = {str(question.id): question for question in questions}
    groups: dict[tuple[str, str, str], Answered] = {}
    notes = []
    for path in paths:
        records, torn = read_records(path)
        if torn:
            notes.append(f"{path}: the last line is torn and left out")
        if not records:
            raise DataError(f"{path} holds no answers", where=str(path))
        for number, record in enumerate(records, start=1):
            name, answers = _answer(record, asked, f"{path}:{number}")
            model, digest = record.get("model"), record.get("digest")
            settings = record.get("settings")
            label = model if isinstance(model, str) and model.strip() else path.stem
            key = (label, str(digest), repr(settings))
            group = groups.setdefault(key, Answered(label, str(path), digest, settings))
            group.answers[name] = answers
    found = list(groups.values())
    _tell_apart(found)
    for group in found:
        missing = len(asked.keys() - group.answers.keys())
        if missing:
            notes.append(f"{group.label}: {missing} of {len(asked)} questions have no answer")
    return found, notes


def _answer(
    record: Mapping[str, Any], asked: Mapping[str, Question], where: str
) -> tuple[str, tuple[str, ...]]:
    """(question id, answers), checked against the question."""
    answers = record.get("answers")
    if "question_id" not in record or not isinstance(answers, list):
        raise FileFormatError(
            "the line is no answer: it needs question_id and answers, a list of texts",
            where=where,
            fix="`sparsegrad generate RUN --prompts FILE` writes such lines",
        )
    name = str(record["question_id"])
    if name not in asked:
        raise DataError(
            f"--questions has no question {name!r}, which is answered here", where=where
        )
    turns = record.get("turns", list(asked[name].turns))
    if turns != list(asked[name].turns):
        raise DataError(
            f"question {name!r} was put in other words than --questions has it",
            where=where,
            fix="judge with the file that the answers were generated from",
        )
    if len(answers) != len(turns) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f"question {name!r} has {len(turns)} turns: it needs as many answers", where=where
        )
    return name, tuple(answers)


def _tell_apart(groups: Sequence[Answered]) -> None:
    """Mark groups of one label by their files, by their weights, or by number."""
    labels = [group.label for group in groups]
    for label in {label for label in labels if labels.count(label) > 1}:
        same = [group for group in groups if group.label == label]
        stems = [Path(group.file).stem for group in same]
        digests = [str(group.digest)[:8] for group in same]
        numbers = [str(number) for number in range(1, len(same) + 1)]
        marks = next(m for m in (stems, digests, numbers) if len(set(m)) == len(same))
        for group, mark in zip(same, marks, strict=True):
            group.label = f"{label} ({mark})"
