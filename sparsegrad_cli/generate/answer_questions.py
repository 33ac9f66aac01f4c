"""Write answers to a JSON-lines file; a later call adds the missing ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.data.questions import Question, file_word, questions_name
from sparsegrad_cli.generate.answer_files import check_line
from sparsegrad_cli.generate.options import GenerateOptions
from sparsegrad_cli.io.jsonl import Journal
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.base import now
from sparsegrad_cli.tasks.answerer import Answer, Answerer

FORMAT = "sparsegrad-answers-1"
Line = dict[str, Any]  # A line of the file; see sparsegrad_cli.records.answers.AnswerLine.


def answer_questions(
    answerer: Answerer,
    about: dict[str, Any],
    questions: Sequence[Question],
    options: GenerateOptions,
    observer: Observer,
) -> dict[str, Any]:
    """Answer the questions that have no answer yet, in batches, turn by turn.

    Args:
        answerer: The model.
        about: The fields about the model in every line, see :class:`ChatModel`.
        questions: The questions, in order.
        options: Where answers are written, and the batch size.
        observer: Receives progress and notes.

    Returns:
        ``about``, ``settings``, ``questions``, ``output``, the numbers ``asked`` and ``kept``, and
        ``answers``: the line of every question, in order.

    Raises:
        DataError: The chat template rejects a conversation.
        UsageError, FileFormatError, DiskError: See :class:`Journal`.
    """
    path = options.output
    if path is None and options.prompt is None:
        path = default_output(about["model"], options.questions or "")
    common = {**about, "settings": answerer.settings.record()}
    task = _Task(answerer, common, questions, options.batch_size, observer)
    if path is None:
        lines, asked = task.complete([], lambda line: None)
    else:
        with Journal(path, FORMAT) as journal:
            if journal.torn:
                observer.note(f"{path}: the last line was incomplete; its question is asked again")
            for number, line in enumerate(journal.records, start=1):
                check_line(line, f"{path}:{number}")
            lines, asked = task.complete(journal.records[:], journal.append)
    full = sum("full" in line.get("stopped", ()) for line in lines)
    if full:
        observer.note(f"{full} answers were cut at the model's last position")
    for note in answerer.notes:
        observer.note(note)
    return {
        **common,
        "questions": options.questions,
        "output": None if path is None else str(path),
        "asked": asked,
        "kept": len(lines) - asked,
        "answers": lines,
    }


def default_output(model: str, questions: str) -> Path:
    """Return ``runs/answers/<model>-<questions>.jsonl``."""
    words = (file_word(model), questions_name(questions))
    return Path("runs") / "answers" / ("-".join(word for word in words if word) + ".jsonl")


def answers_to(questions: Sequence[Question], lines: Sequence[Line]) -> list[Line] | None:
    """Return the last line of every question, in order; None if a question has none."""
    found = {json.dumps([line.get("question_id"), line.get("turns")]): line for line in lines}
    keys = [json.dumps([question.id, list(question.turns)]) for question in questions]
    return [found[key] for key in keys] if found.keys() >= set(keys) else None


class _Task:
    """Questions to one model with one set of settings."""

    def __init__(
        self,
        answerer: Answerer,
        common: dict[str, Any],
        questions: Sequence[Question],
        batch_size: int,
        observer: Observer,
    ) -> None:
        self._answerer, self._common, self._questions = answerer, common, questions
        self._batch_size, self._observer = batch_size, observer

    def complete(
        self, kept: Sequence[Line], write: Callable[[Line], None]
    ) -> tuple[list[Line], int]:
        """Return the line of every question, and how many were answered now."""
        observer, questions = self._observer, self._questions
        lines = {_key(line, line.get("question_id"), line.get("turns")): line for line in kept}
        keys = [_key(self._common, question.id, list(question.turns)) for question in questions]
        todo = [q for q, key in zip(questions, keys, strict=True) if key not in lines]
        done = len(questions) - len(todo)
        if done:
            observer.note(f"{done} of {len(questions)} questions are answered already")
        observer.phase("generate", f"{len(questions)} questions")
        observer.total_steps("generate", len(questions), done=done, unit="questions")
        for start in range(0, len(todo), self._batch_size):
            batch = todo[start : start + self._batch_size]
            for question, answers in zip(batch, self._converse(batch), strict=True):
                line = self._line(question, answers)
                write(line)
                lines[_key(line, question.id, line["turns"])] = line
            done += len(batch)
            observer.step("generate", {"step": done})
        return [lines[key] for key in keys], len(todo)

    def _converse(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """Answer all turns of a batch of questions; the n-th turns of all are one batch."""
        talks: list[list[Turn]] = [[] for _ in questions]
        answers: list[list[Answer]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [k for k, question in enumerate(questions) if turn < len(question.turns)]
            for k in rows:
                talks[k].append(Turn("user", questions[k].turns[turn]))
            name = f"{turn} {[str(questions[k].id) for k in rows]}"
            answered = self._answerer.answer([talks[k] for k in rows], name)
            for k, answer in zip(rows, answered, strict=True):
                answers[k].append(answer)
                talks[k].append(Turn("assistant", answer.text))
        return answers

    def _line(self, question: Question, answers: Sequence[Answer]) -> Line:
        return {
            "question_id": question.id,
            "category": question.category,
            "turns": list(question.turns),
            "answers": [answer.text for answer in answers],
            **self._common,
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "answer_tokens": [answer.tokens for answer in answers],
            "stopped": [answer.stopped for answer in answers],
            "seconds": round(sum(answer.seconds for answer in answers), 3),
            "time": now(),
        }


def _key(about: Line, name: object, turns: object) -> str:
    """Return the key of an answer: its question, weights and settings."""
    parts = [str(name), turns, about.get("digest"), about.get("settings")]
    return json.dumps(parts, sort_keys=True)
