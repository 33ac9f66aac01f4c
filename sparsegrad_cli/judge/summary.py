"""Summarize verdicts: means with standard errors, wins, flips, and missing verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from sparsegrad_cli.judge.endpoint import DECIDED, FAILED, UNREADABLE
from sparsegrad_cli.judge.tasks import Task

Verdicts = Mapping[str, Mapping[str, Any]]  # Key of a task -> its last record.


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, std / sqrt(n); None for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def grade_rows(tasks: Sequence[Task], verdicts: Verdicts) -> list[dict[str, Any]]:
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
            rows.append({"model": model, "category": category, **_grades(part, verdicts)})
    return rows


def _grades(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, Any]:
    by_question: dict[str, list[float]] = {}
    by_turn: dict[int, list[float]] = {}
    for task in tasks:
        found = verdicts.get(task.key, {})
        if found.get("status") == DECIDED:
            by_question.setdefault(str(task.question.id), []).append(float(found["verdict"]))
            by_turn.setdefault(task.turn, []).append(float(found["verdict"]))
    grades = [math.fsum(values) / len(values) for values in by_question.values()]
    return {
        "mean": _mean(grades),
        "standard_error": standard_error(grades),
        "questions": len(grades),
        "graded": sum(map(len, by_question.values())),
        "turn_means": [_mean(by_turn.get(turn, [])) for turn in range(_turns(tasks))],
        **_missing(tasks, verdicts),
    }


def pair_rows(tasks: Sequence[Task], verdicts: Verdicts) -> list[dict[str, Any]]:
    """Return a row for all pairs, then a row per category, from tasks in both orders.

    A model wins a pair if both orders prefer it. If they disagree, the pair is a tie. It is a flip
    if each order preferred a different model, so that the order decided. ``share`` is the first
    model's share of wins, in which a tie counts half. Its standard error counts questions.
    """
    rows = []
    for category in (None, *_categories(tasks)):
        part = [t for t in tasks if category is None or t.question.category == category]
        rows.append({"category": category, **_pairs(part, verdicts)})
    return rows


def _pairs(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, Any]:
    one, other = tasks[0].models
    counts = dict.fromkeys(("wins", "losses", "ties", "flips", "first_flips", "one_order"), 0)
    shares: dict[str, list[float]] = {}
    for forth, back in zip(tasks[::2], tasks[1::2], strict=True):
        said = [verdicts.get(task.key, {}).get("verdict") for task in (forth, back)]
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
        "standard_error": standard_error(by_question),
        "questions": len(by_question),
        "pairs": sum(map(len, shares.values())),
        **counts,
        **_missing(tasks, verdicts),
    }


def _preferred(task: Task, verdict: Any) -> str | None:
    """Return the model that a verdict prefers, or None for a tie."""
    return {"A": task.models[0], "B": task.models[1]}.get(str(verdict))


def _missing(tasks: Sequence[Task], verdicts: Verdicts) -> dict[str, int]:
    statuses = [verdicts.get(task.key, {}).get("status") for task in tasks]
    return {
        "asked": len(tasks),
        "unreadable": statuses.count(UNREADABLE),
        "failed": statuses.count(FAILED),
    }


def _turns(tasks: Iterable[Task]) -> int:
    return max((task.turn + 1 for task in tasks), default=0)


def _categories(tasks: Iterable[Task]) -> list[str]:
    """Return the categories in the order of the questions."""
    return list(dict.fromkeys(t.question.category for t in tasks if t.question.category))
