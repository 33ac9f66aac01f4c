"""Which differences between methods a comparison shows: in words, and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.access import block, items, mappings, number, text
from sparsegrad_cli.report.compare_record import interval_of
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_interval, format_p, format_score

_MOST_PAIRS = 45  # ten methods; beyond, those with the smallest p


def verdict_lines(compare: Any) -> list[str]:
    """What the tests show, each difference in a sentence; and plainly, what they do not show."""
    tests = block(compare, "tests")
    if not tests:
        return ["Differences: not tested."]
    pairs = mappings(tests, "pairs")
    if not pairs:
        return [_untested(compare)] if number(tests, "untested") else []
    level = number(tests, "level") or 0.0
    shown = [pair for pair in pairs if text(pair, "better")]
    lines = [_shown(pair) for pair in shown]
    rest = len(pairs) - len(shown)
    if rest:
        other = "other " if shown else ""
        where = f"any of the {other}{rest} pairs" if rest > 1 else f"the {other or 'one '}pair"
        lines.append(
            f"No difference shown in {where} of methods, which does not mean that there is none "
            f"(level {level:g} over all pairs together)."
        )
        lines += _hopeless(pairs, level)
    return lines


def _untested(compare: Any) -> str:
    if len(items(compare, "seeds")) == 1:
        return "n = 1: one seed ranks no method, and no difference is tested."
    why = "no two methods have two finished seeds of a task in common"
    return f"No method is ranked and no difference is tested: {why}."


def _shown(pair: Mapping[str, Any]) -> str:
    better = text(pair, "better")
    worse = text(pair, "b") if better == text(pair, "a") else text(pair, "a")
    mean, scale = number(pair, "mean"), scale_of(text(pair, "metric"))
    facts = [_cells(pair), f"Holm's p {_p(pair, 'p_holm')}"]
    if mean is None:
        return f"{better} is better than {worse} ({'; '.join(facts)})."
    sign = (1 if better == text(pair, "a") else -1) * (-1 if scale.lower_is_better else 1)
    if sign * mean <= 0:  # tasks of unlike spread: the test weighs them, the plain mean does not
        gap = f"has {worse} ahead by {format_score(abs(mean), scale)}" if mean else "is even"
        return (
            f"{better} is better than {worse} where each task counts in its own spread "
            f"({'; '.join(facts)}), though the plain mean over tasks {gap}."
        )
    low, high = interval_of(pair, "interval")
    if low is not None and high is not None:
        low, high = (low, high) if sign > 0 else (-high, -low)
        facts.insert(0, f"95 % interval {format_interval(low, high, scale)}")
    by = format_score(abs(mean), scale)
    return f"{better} is better than {worse} by {by} ({'; '.join(facts)})."


def _cells(pair: Mapping[str, Any]) -> str:
    n, tasks = number(pair, "n") or 0, number(pair, "tasks") or 0
    return f"{_counted(n, 'paired run')} on {_counted(tasks, 'task')}"


def _counted(count: float, thing: str) -> str:
    return f"{count:.0f} {thing}{'' if count == 1 else 's'}"


def _p(pair: Mapping[str, Any], key: str) -> str:
    value = number(pair, key)
    return "–" if value is None else format_p(value)


def _hopeless(pairs: Sequence[Mapping[str, Any]], level: float) -> list[str]:
    """Says so where no data whatever could have shown a difference, and how many seeds could."""
    least = min((p for p in (number(pair, "smallest_p") for pair in pairs) if p), default=0.0)
    most_p = min(1.0, least * len(pairs))
    if most_p <= level or level <= 0:
        return []
    tasks = max(number(pair, "tasks") or 1 for pair in pairs)
    needed = math.ceil((1 + math.log2(len(pairs) / level)) / tasks)
    most = max(number(pair, "n") or 0 for pair in pairs)
    corrected = ""
    if len(pairs) > 1:
        corrected = f", which correcting for {len(pairs)} pairs of methods makes {most_p:.2g}"
    return [
        f"This many runs could not have shown any: {_counted(most, 'pair')} of runs give no p "
        f"below {least:.2g}{corrected}. {needed:.0f} seeds could."
    ]


def pairs_table(compare: Any) -> Table | None:
    """One row a pair of methods: how often each won, by how much, and how sure that is."""
    tests = block(compare, "tests")
    pairs = mappings(tests, "pairs")
    if not pairs:
        return None
    kept = sorted(pairs, key=lambda p: number(p, "p") or 0.0)[:_MOST_PAIRS]
    listed = [pair for pair in pairs if pair in kept]
    rows: list[tuple[Cell, ...]] = [_pair_row(pair) for pair in listed]
    notes = [
        f"p: {text(tests, 'test') or 'not recorded'}. Corrected: {text(tests, 'correction')}.",
        f"t: {text(tests, 'check') or 'not recorded'}. The interval is that test's, uncorrected.",
    ]
    if len(kept) < len(pairs):
        notes.append(f"the {len(kept)} of {len(pairs)} pairs with the smallest p")
    header = (
        *("pair", "runs", "won\u00a0:\u00a0lost", "difference", "95 % interval"),
        *("p", "p, Holm", "t, Holm", "shown"),
    )
    caption = "Pairs of methods over all seeds and tasks"
    return Table(caption, header, rows, prose=1, notes=notes)


def _pair_row(pair: Mapping[str, Any]) -> tuple[Cell, ...]:
    scale = scale_of(text(pair, "metric"))
    mean, better = number(pair, "mean"), text(pair, "better")
    wins, losses = number(pair, "wins") or 0, number(pair, "losses") or 0
    return (
        f"{text(pair, 'a')} − {text(pair, 'b')}",
        f"{number(pair, 'n') or 0:.0f}",
        f"{wins:.0f} : {losses:.0f}",
        "–" if mean is None else format_score(mean, scale, sign=True),
        format_interval(*interval_of(pair, "interval"), scale) or "–",
        _p(pair, "p"),
        _p(pair, "p_holm"),
        _p(pair, "p_t_holm"),
        f"{better} better" if better else "no difference shown",
    )
