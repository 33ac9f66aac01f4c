"""Questions to a file of answers, one line a question, that a later call goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.conversation import Turn
from sparsegrad_cli.generate.answerer import Answer, Answerer
from sparsegrad_cli.generate.options import GenerateOptions
from sparsegrad_cli.generate.questions import Question, file_word, questions_name
from sparsegrad_cli.io.jsonl import Journal
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.records.base import now

FORMAT = "sparsegrad-answers-1"


def answer_questions(
    answerer: Answerer,
    about: dict[str, Any],
    questions: Sequence[Question],
    options: GenerateOptions,
    observer: Observer,
) -> dict[str, Any]:
    """Answer what has no answer yet, turn by turn, a batch at a time.

    Args:
        about: the model's record, of :func:`sparsegrad_cli.generate.load_chat_model.load_run`.

    Returns:
        What was done, with ``answers``: the line of every question, in their order.

    Raises:
        DataError: the chat template refuses a conversation.
        UsageError, FileFormatError, DiskError: see :class:`Journal`.
    """
    path = options.output
    if path is None and options.prompt is None:
        path = default_output(about["model"], options.questions or "")
    common = {**about, "settings": answerer.settings.record()}
    if path is None:
        lines, asked = _complete(answerer, common, questions, [], options, observer, _nowhere)
    else:
        with Journal(path, FORMAT) as journal:
            if journal.torn:
                observer.note(f"{path}: the last line was torn; its question is asked again")
            kept = journal.records[:]
            lines, asked = _complete(
                answerer, common, questions, kept, options, observer, journal.append
            )
    full = sum("full" in line.get("stopped", ()) for line in lines)
    if full:
        observer.note(f"{full} answers were cut where the model's positions end")
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
    """``runs/answers/<model>-<questions>.jsonl``."""
    words = (file_word(model), questions_name(questions))
    return Path("runs") / "answers" / ("-".join(word for word in words if word) + ".jsonl")


def answers_to(
    questions: Sequence[Question], lines: Sequence[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """The last line of every question, in their order; None if one of them has none."""
    found = {json.dumps([line.get("question_id"), line.get("turns")]): line for line in lines}
    keys = [json.dumps([question.id, list(question.turns)]) for question in questions]
    return [found[key] for key in keys] if found.keys() >= set(keys) else None


def _nowhere(line: dict[str, Any]) -> None:
    """Where answers to a prompt are written that nobody asked to keep."""


def _complete(
    answerer: Answerer,
    common: dict[str, Any],
    questions: Sequence[Question],
    kept: Sequence[dict[str, Any]],
    options: GenerateOptions,
    observer: Observer,
    write: Callable[[dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], int]:
    """The line of every question, and how many were made now."""
    lines = {_key(line, line.get("question_id"), line.get("turns")): line for line in kept}
    keys = [_key(common, question.id, list(question.turns)) for question in questions]
    todo = [q for q, key in zip(questions, keys, strict=True) if key not in lines]
    if len(todo) < len(questions):
        observer.note(f"{len(questions) - len(todo)} of {len(questions)} are answered already")
    observer.total_steps("generate", len(questions))
    done = len(questions) - len(todo)
    observer.step("generate", {"step": done})
    for start in range(0, len(todo), options.batch_size):
        batch = todo[start : start + options.batch_size]
        for question, answers in zip(batch, _talk(answerer, batch), strict=True):
            line = _line(question, answers, common)
            write(line)
            lines[_key(line, question.id, line["turns"])] = line
        done += len(batch)
        observer.step("generate", {"step": done})
    return [lines[key] for key in keys], len(todo)


def _key(about: dict[str, Any], name: Any, turns: Any) -> str:
    """What makes an answer the same one: question, weights and settings."""
    parts = [str(name), turns, about.get("digest"), about.get("settings")]
    return json.dumps(parts, sort_keys=True)


def _talk(answerer: Answerer, questions: Sequence[Question]) -> list[list[Answer]]:
    """All turns of a batch of questions: the n-th of all of them together."""
    talks: list[list[Turn]] = [[] for _ in questions]
    answers: list[list[Answer]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        rows = [k for k, question in enumerate(questions) if turn < len(question.turns)]
        for k in rows:
            talks[k].append(Turn("user", questions[k].turns[turn]))
        name = f"{turn} {[str(questions[k].id) for k in rows]}"
        for k, answer in zip(rows, answerer.answer([talks[k] for k in rows], name), strict=True):
            answers[k].append(answer)
            talks[k].append(Turn("assistant", answer.text))
    return answers


def _line(question: Question, answers: Sequence[Answer], common: dict[str, Any]) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "category": question.category,
        "turns": list(question.turns),
        "answers": [answer.text for answer in answers],
        **common,
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "answer_tokens": [answer.tokens for answer in answers],
        "stopped": [answer.stopped for answer in answers],
        "seconds": round(sum(answer.seconds for answer in answers), 3),
        "time": now(),
    }
