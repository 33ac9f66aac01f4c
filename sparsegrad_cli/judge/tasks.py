"""What is to be asked of the judge: one prompt a turn, or two a turn and pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.questions import Question
from sparsegrad_cli.judge.answers import Answered
from sparsegrad_cli.judge.prompts import Messages, choosing_prompt, grading_prompt


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        key: sha256 (hex) of judge model and prompt, and so of questions and answers too.
        question: that was answered.
        turn: of its answers; 0 is the first.
        models: label of the graded model; or of both, as A and B stand in the prompt.
        messages: the prompt.
    """

    key: str
    question: Question
    turn: int
    models: tuple[str, ...]
    messages: Messages

    @property
    def pairwise(self) -> bool:
        """Two answers are compared."""
        return len(self.models) == 2

    def record(self) -> dict[str, Any]:
        """For verdicts.jsonl."""
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
    """A grade of every turn of every answered question, model by model."""
    tasks = []
    for group in groups:
        for question, turn in _turns(questions, (group,)):
            answers = group.answers[str(question.id)]
            messages = grading_prompt(question, answers, turn)
            tasks.append(_task(question, turn, (group.label,), messages, judge))
    return tasks


def pair_tasks(questions: Sequence[Question], groups: Sequence[Answered], judge: str) -> list[Task]:
    """Both orders of every turn of every question that both models answered.

    Raises:
        UsageError: there are not two groups.
    """
    if len(groups) != 2:
        names = ", ".join(group.label for group in groups)
        raise UsageError(
            f"--pairwise compares two models, and here are {len(groups)}: {names}",
            fix="two files of answers, each of one model with one set of settings",
        )
    tasks = []
    for question, turn in _turns(questions, groups):
        for first, second in (groups, groups[::-1]):
            messages = choosing_prompt(
                question,
                first.answers[str(question.id)],
                second.answers[str(question.id)],
                turn,
            )
            tasks.append(_task(question, turn, (first.label, second.label), messages, judge))
    return tasks


def _turns(
    questions: Sequence[Question], groups: Sequence[Answered]
) -> Iterator[tuple[Question, int]]:
    """Every turn of the questions that all groups answered."""
    for question in questions:
        if all(str(question.id) in group.answers for group in groups):
            for turn in range(len(question.turns)):
                yield question, turn


def _task(
    question: Question, turn: int, models: tuple[str, ...], messages: Messages, judge: str
) -> Task:
    asked = json.dumps({"judge": judge, "messages": messages}, sort_keys=True)
    return Task(hashlib.sha256(asked.encode()).hexdigest(), question, turn, models, messages)
