"""How the methods of a comparison were tuned: in words, best settings, and every trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.access import block, dig, items, mappings, number, text
from sparsegrad_cli.report.compare_record import tasks_of
from sparsegrad_cli.report.labels import status_of, status_words
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_count, format_number, format_score, format_seconds

Line = tuple[bool | None, str]


def settings_words(settings: Any) -> str:
    """``learning_rate 0.0005, warmup_steps 0.1``."""
    found = settings if isinstance(settings, Mapping) else {}
    return ", ".join(f"{_name(key)} {_value(value)}" for key, value in found.items())


def _name(key: Any) -> str:
    return (text(key) or "?").removeprefix("train.")


def _value(value: Any) -> str:
    found = number(value)
    return text(value) or "?" if found is None else format_number(found, 4)


def outcome_words(trial: Any) -> str:
    """``61.2``; ``pruned, 48.0 so far``; ``failed: the loss is not finite``."""
    status, score = status_of(trial), number(trial, "score")
    scale = scale_of(text(trial, "metric"))
    shown = "" if score is None else f"{scale.column} {format_score(score, scale)}"
    if status == "done":
        return shown or status
    if status == "pruned":
        return ", ".join(part for part in ("pruned", shown and f"{shown} so far") if part)
    return ": ".join(part for part in (status_words(status), text(trial, "error")) if part)


def tuning_progress(compare: Any) -> str:
    """``3 of 16 trials of tuning``; nothing where there is none, or all have ended."""
    tuning = block(compare, "tuning")
    series = mappings(tuning, "series")
    asked = (number(tuning, "trials") or 0) * len(series)
    there = sum(len(mappings(each, "trials")) for each in series)
    return f"{there} of {asked:.0f} trials of tuning" if there < asked else ""


def tuning_lines(compare: Any) -> list[str]:
    """What a reader has to know of tuning before believing it; nothing where there was none."""
    lines = []
    several = len(tasks_of(compare)) > 1
    for series in mappings(compare, "tuning", "series"):
        row = text(series, "method") or "?"
        if several:
            row = f"{text(series, 'task') or '?'}, {row}"
        for edge in mappings(series, "edges"):
            lines.append(
                f"{row}: the best {_name(dig(edge, 'key'))} is the {text(edge, 'end')} that was "
                "tried; the best there is may lie beyond."
            )
        trials = mappings(series, "trials")
        if trials and all(status_of(trial) in ("failed", "out_of_memory") for trial in trials):
            lines.append(f"{row}: no trial came to an end, so it has no settings to run with.")
    return lines


def tuning_check(compare: Any) -> Line | None:
    """Whether every method was tuned alike; None where none was."""
    tuning = block(compare, "tuning")
    if not tuning:
        return None
    counts = {len(mappings(series, "trials")) for series in mappings(tuning, "series")}
    asked = number(tuning, "trials") or 0
    seeds = _listed(tuning, "seeds")
    if counts != {asked}:
        return None, f"Tuning of {asked:.0f} trials a method and task: not done yet."
    said = f"{asked:.0f} trials of tuning for every method on every task"
    return True, f"{said}, over as wide a space, on seeds that are not reported ({seeds})."


def _listed(data: Any, key: str) -> str:
    return ", ".join(text(item) or "?" for item in items(data, key))


def tuning_table(compare: Any) -> Table | None:
    """One row a method and task: trials, the best settings, what they scored, what it took."""
    tuning = block(compare, "tuning")
    several = len(tasks_of(compare)) > 1
    rows: list[tuple[Cell, ...]] = []
    for series in mappings(tuning, "series"):
        scale = scale_of(text(series, "metric"))
        best = block(series, "best")
        task = (text(series, "task"),) if several else ()
        rows.append(
            (
                *task,
                text(series, "method"),
                settings_words(dig(best, "settings")) or "–",
                _space(series),
                _counts(series),
                format_score(number(best, "score"), scale) if best else "–",
                format_seconds(number(series, "seconds")),
            )
        )
    if not rows:
        return None
    columns = ("method", "best settings", "space", "trials", "score", "time")
    header = ("task", *columns) if several else columns
    notes = [
        f"{text(tuning, 'sampler')}. Pruned: {text(tuning, 'pruner')}.",
        *tuning_lines(compare),
    ]
    caption = f"Tuning on seed {_listed(tuning, 'seeds')}, by the best validation score"
    return Table(caption, header, rows, left=len(header) - 3, notes=notes)


def _space(series: Any) -> str:
    """``0.0002 and 0.02; warmup_steps 0 and 0.2``: the learning rate first, unnamed."""
    parts = []
    for at, dimension in enumerate(mappings(series, "space")):
        low, high = number(dimension, "low"), number(dimension, "high")
        ends = f"{format_number(low, 4)} and {format_number(high, 4)}"
        if low is None or high is None:
            ends = _listed(dimension, "choices")
        parts.append(ends if at == 0 else f"{_name(dig(dimension, 'key'))} {ends}")
    return "; ".join(parts)


def _counts(series: Any) -> str:
    """``8 (2 pruned, 1 failed)``."""
    found = Counter(status_of(trial) for trial in mappings(series, "trials"))
    other = ", ".join(
        f"{count} {status_words(status)}" for status, count in found.items() if status != "done"
    )
    return f"{sum(found.values())} ({other})" if other else f"{sum(found.values())}"


def trials_table(compare: Any) -> Table | None:
    """Every trial of tuning."""
    rows: list[tuple[Cell, ...]] = []
    strong = set()
    for series in mappings(compare, "tuning", "series"):
        scale = scale_of(text(series, "metric"))
        best = number(series, "best", "number")
        for trial in mappings(series, "trials"):
            score, loss, at = (number(trial, key) for key in ("score", "loss", "number"))
            if best is not None and at == best:
                strong |= {(len(rows), 3), (len(rows), 5)}
            rows.append(
                (
                    *(text(series, key) for key in ("task", "method")),
                    "?" if at is None else f"{at + 1:.0f}",
                    settings_words(dig(trial, "settings")),
                    text(trial, "error") or status_words(status_of(trial)),
                    "–" if score is None else format_score(score, scale),
                    "–" if loss is None else format_number(loss),
                    format_count(number(trial, "steps")),
                    format_seconds(number(trial, "seconds")),
                )
            )
    header = ("task", "method", "trial", "settings", "status", "score", "loss", "steps", "time")
    notes = ["score and loss of what was pruned are the best up to there"]
    caption = "Trials of tuning"
    return (
        Table(caption, header, rows, left=5, strong=frozenset(strong), notes=notes)
        if rows
        else None
    )
