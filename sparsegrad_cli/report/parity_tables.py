"""Was a comparison fair? Its hashes and the diff of its recipes, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import block, dig, mappings, number, text
from sparsegrad_cli.report.budget_tables import budget_lines
from sparsegrad_cli.report.compare_record import tasks_of
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.tuning_tables import tuning_check

_SAME = {
    "same_model": "model",
    "same_head_init": "head",
    "same_order": "order",
    "same_data": "data",
    "same_precision": "precision",
}
# set for a budget -> what is said of it
_SOLVED = {
    "train.per_device_train_batch_size": "batches cut up for the budget, as many examples a step",
}
Line = tuple[bool | None, str]


def check_lines(compare: Any) -> list[Line]:
    """(held, sentence) of hashes, the recipes' diff, budget and tuning: what held, together."""
    tuned = tuning_check(compare)
    lines = [*_hash_lines(compare), *_parity_lines(compare), *budget_lines(compare)]
    return [*lines, *([tuned] if tuned else [])]


def _hash_lines(compare: Any) -> list[Line]:
    checks = mappings(compare, "checks")
    if not checks:
        return [(None, "Same model, head, order, data and precision: not recorded.")]
    lines: list[Line] = []
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for check in checks:
        wrong = [word for key, word in _SAME.items() if dig(check, key) is False]
        if wrong:
            where = f"{text(check, 'task') or '?'}, seed {text(check, 'seed') or '?'}"
            lines.append((False, f"{where}: methods did NOT have the same {_and(wrong)}."))
        else:
            known = tuple(word for key, word in _SAME.items() if dig(check, key) is True)
            groups.setdefault(known, []).append(check)
    for known, group in groups.items():
        pairs = f"{len(group)} of {len(checks)} pairs of task and seed"
        if not known:
            lines.append((None, f"{pairs}: fewer than two methods to compare."))
            continue
        steps = [count for count in (number(c, "steps_compared") for c in group) if count]
        upto = f" (order over at least {min(steps):,.0f} steps)" if steps else ""
        lines.append((True, f"{pairs}: all methods had the same {_and(known)}{upto}."))
        missing = [word for word in _SAME.values() if word not in known]
        if missing:
            lines.append((None, f"{pairs}: same {_and(missing)}: not recorded."))
    if any(dig(check, "same_code") is False for check in checks):
        said = "methods of one task and seed ran under different commits, versions or devices"
        lines.append((None, f"Not all cells are of one code: {said}."))
    return sorted(lines, key=lambda line: line[0] is not True)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _parity_lines(compare: Any) -> list[Line]:
    parity = block(compare, "parity")
    if not parity:
        return [(None, "Whether the recipes differ beyond their methods: not recorded.")]
    lines: list[Line] = []
    for found in mappings(parity, "flagged"):
        where = f"{text(found, 'task') or '?'}: methods differ in {text(found, 'key') or '?'}"
        lines.append((False, f"{where} ({_values(found)}), as the study allows."))
    if not lines:
        count = number(parity, "compared")
        keys = f"{count:.0f} keys " if count is not None else ""
        declared = mappings(parity, "declared")
        solved = {text(found, "key") for found in declared if _is_solved(found)}
        tuned = {text(found, "key") for found in declared if not _is_solved(found)}
        what = "learning rates" if tuned <= {"train.learning_rate"} else "settings"
        but = [f"{what} as tuned for each"] if tuned else []
        but += [words for key, words in _SOLVED.items() if key in solved]
        said = f"recipes compared before the first run: {keys}outside the methods equal"
        said = ", ".join([said, *but])
        lines.append((True, f"{said[0].upper()}{said[1:]}."))
    return lines


def _is_solved(found: Mapping[str, Any]) -> bool:
    return text(found, "why") == "budget"


def _values(found: Mapping[str, Any]) -> str:
    values = block(found, "values")
    return ", ".join(f"{text(label)} {text(value) or 'none'}" for label, value in values.items())


def parity_table(compare: Any) -> Table | None:
    """What differs between the methods of a task beside the methods themselves."""
    parity = block(compare, "parity")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for kind, word in (("flagged", "allowed by the study"), ("declared", "tuned by method")):
        for found in mappings(parity, kind):
            why = "set for the budget" if _is_solved(found) else word
            key = (text(found, "key") or "?", why, _values(found))
            rows.setdefault(key, []).append(text(found, "task") or "?")
    if not rows:
        return None
    every = len(tasks_of(compare))
    listed: list[tuple[Cell, ...]] = [
        (key, "all" if len(tasks) == every > 1 else ", ".join(tasks), word, values)
        for (key, word, values), tasks in rows.items()
    ]
    header = ("recipe key", "tasks", "why", "by method")
    return Table("What differs beside the methods", header, listed, left=4)
