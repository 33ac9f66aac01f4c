"""Show which differences between methods are significant, in sentences and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.study import PairTest, StudyRecord
from sparsegrad_cli.report.document import Column, Table
from sparsegrad_cli.report.units import (
    MINUS,
    NOTHING,
    counted,
    format_interval,
    format_p,
    format_score,
)

_MAX_PAIRS = 45  # Ten methods. With more, only the pairs with the smallest p are shown.


def verdict_lines(study: StudyRecord) -> list[str]:
    """Return a sentence per significant difference, and one about the differences that are not."""
    tests = study.tests
    if tests is None:
        return ["Differences: not tested."]
    if not tests.pairs:
        return [_untested(study)] if tests.untested else []
    level = tests.level or 0.0
    shown = [pair for pair in tests.pairs if pair.better]
    lines = [_better(pair) for pair in shown]
    rest = len(tests.pairs) - len(shown)
    if rest:
        other = "other " if shown else ""
        where = f"any of the {other}{rest} pairs" if rest > 1 else f"the {other or 'one '}pair"
        lines.append(
            f"No difference shown in {where} of methods, which does not mean that there is none "
            f"(level {level:g} over all pairs together)."
        )
        lines += _too_few_runs(tests.pairs, level)
    return lines


def _untested(study: StudyRecord) -> str:
    if len(study.seeds) == 1:
        return "n = 1: one seed ranks no method, and no difference is tested."
    return (
        "No method is ranked and no difference is tested: no two methods have two finished seeds "
        "of a task in common."
    )


def _better(pair: PairTest) -> str:
    worse = pair.b if pair.better == pair.a else pair.a
    scale = scale_of(pair.metric)
    runs = f"{counted(pair.n, 'paired run')} on {counted(pair.tasks, 'task')}"
    evidence = [runs, f"Holm's p {format_p(pair.p_holm)}"]
    if pair.mean is None:
        return f"{pair.better} is better than {worse} ({'; '.join(evidence)})."
    sign = (1 if pair.better == pair.a else -1) * (-1 if scale.lower_is_better else 1)
    if sign * pair.mean <= 0:  # Only the test weighs tasks by their spread.
        lead = f"puts {worse} ahead by {format_score(abs(pair.mean), scale)}"
        return (
            f"{pair.better} is better than {worse} when each task is weighted by its own spread "
            f"({'; '.join(evidence)}), although the plain mean over tasks "
            f"{lead if pair.mean else 'is even'}."
        )
    if pair.interval is not None:
        low, high = pair.interval
        interval = (low, high) if sign > 0 else (-high, -low)
        evidence.insert(0, f"95 % interval {format_interval(interval, scale)}")
    by = format_score(abs(pair.mean), scale)
    return f"{pair.better} is better than {worse} by {by} ({'; '.join(evidence)})."


def _too_few_runs(pairs: Sequence[PairTest], level: float) -> list[str]:
    """Return a sentence if there are too few runs for any difference, with the seeds needed."""
    least = min((pair.smallest_p for pair in pairs if pair.smallest_p), default=0.0)
    corrected = min(1.0, least * len(pairs))
    if corrected <= level or level <= 0:
        return []
    tasks = max(max(pair.tasks for pair in pairs), 1)
    needed = math.ceil((1 + math.log2(len(pairs) / level)) / tasks)
    most = counted(max(pair.n for pair in pairs), "pair")
    after = ""
    if len(pairs) > 1:
        after = f", or {corrected:.2g} after correcting for {len(pairs)} pairs of methods"
    return [
        f"This many runs could not have shown any: {most} of runs give no p below "
        f"{least:.2g}{after}. {needed:.0f} seeds could."
    ]


def pairs_table(study: StudyRecord) -> Table | None:
    """Return one row per pair of methods: wins, difference, interval and p-values."""
    tests = study.tests
    if tests is None or not tests.pairs:
        return None
    smallest = sorted(tests.pairs, key=lambda pair: pair.p or 0.0)[:_MAX_PAIRS]
    listed = [pair for pair in tests.pairs if pair in smallest]
    notes = [
        f"p: {tests.test}. Corrected: {tests.correction}.",
        f"t: {tests.check}. The interval is from this test, uncorrected.",
    ]
    if len(listed) < len(tests.pairs):
        notes.append(f"the {len(listed)} of {len(tests.pairs)} pairs with the smallest p")
    columns: list[Column[PairTest]] = [
        Column("pair", lambda pair: f"{pair.a} {MINUS} {pair.b}", words=True),
        Column("runs", lambda pair: str(pair.n)),
        Column("won\u00a0:\u00a0lost", lambda pair: f"{pair.wins} : {pair.losses}"),
        Column("difference", _difference),
        Column("95 % interval", lambda p: format_interval(p.interval, scale_of(p.metric))),
        Column("p", lambda pair: format_p(pair.p)),
        Column("p, Holm", lambda pair: format_p(pair.p_holm)),
        Column("t, Holm", lambda pair: format_p(pair.p_t_holm)),
        Column("shown", _shown, words=True),
    ]
    return Table.of(listed, columns, "Pairs of methods over all seeds and tasks", notes)


def _difference(pair: PairTest) -> str:
    if pair.mean is None:
        return NOTHING
    return format_score(pair.mean, scale_of(pair.metric), sign=True)


def _shown(pair: PairTest) -> str:
    return f"{pair.better} better" if pair.better else "no difference shown"
