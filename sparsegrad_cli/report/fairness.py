"""Check whether a study is fair, by the hashes of its runs and the diff of its recipes."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegrad_cli.records.study import Check as RunCheck
from sparsegrad_cli.records.study import KeyDifference, StudyRecord
from sparsegrad_cli.report.budget import budget_checks
from sparsegrad_cli.report.document import Check, Table
from sparsegrad_cli.report.scores import tasks_of
from sparsegrad_cli.report.tuning import tuning_check
from sparsegrad_cli.report.units import format_count, words

_SAME = {
    "same_model": "model",
    "same_head_init": "head",
    "same_order": "order",
    "same_data": "data",
    "same_precision": "precision",
}
_SET_FOR_BUDGET = {
    "train.per_device_train_batch_size": "micro-batches set for the budget, with the same "
    "effective batch size",
}


def check_lines(study: StudyRecord) -> list[Check]:
    """Return the checks of hashes, recipes, budget and tuning."""
    tuned = tuning_check(study)
    checks = [*_hash_checks(study), *_recipe_checks(study), *budget_checks(study.budget)]
    return [*checks, *([tuned] if tuned else [])]


def _hash_checks(study: StudyRecord) -> list[Check]:
    if not study.checks:
        return [Check(None, "Same model, head, order, data and precision: not recorded.")]
    lines: list[Check] = []
    groups: dict[tuple[str, ...], list[RunCheck]] = {}
    for check in study.checks:
        wrong = [word for key, word in _SAME.items() if getattr(check, key) is False]
        if wrong:
            where = f"{check.task}, seed {check.seed}"
            lines.append(Check(False, f"{where}: methods did NOT have the same {_and(wrong)}."))
        else:
            known = tuple(word for key, word in _SAME.items() if getattr(check, key))
            groups.setdefault(known, []).append(check)
    for known, group in groups.items():
        lines += _group_checks(known, group, f"{len(group)} of {len(study.checks)}")
    if any(check.same_code is False for check in study.checks):
        different = "methods of one task and seed ran under different commits, versions or devices"
        lines.append(Check(None, f"Not all runs used the same code: {different}."))
    return sorted(lines, key=lambda line: line.held is not True)


def _group_checks(known: Sequence[str], group: Sequence[RunCheck], share: str) -> list[Check]:
    """Return the checks of a group of (task, seed) pairs with the same recorded hashes."""
    pairs = f"{share} pairs of task and seed"
    if not known:
        return [Check(None, f"{pairs}: fewer than two methods to compare.")]
    steps = [check.steps_compared for check in group if check.steps_compared]
    over = f" (order over at least {format_count(min(steps))} steps)" if steps else ""
    lines = [Check(True, f"{pairs}: all methods had the same {_and(known)}{over}.")]
    missing = [word for word in _SAME.values() if word not in known]
    if missing:
        lines.append(Check(None, f"{pairs}: same {_and(missing)}: not recorded."))
    return lines


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _recipe_checks(study: StudyRecord) -> list[Check]:
    parity = study.parity
    if parity is None:
        return [Check(None, "Whether recipes differ beyond their methods: not recorded.")]
    if parity.flagged:
        return [
            Check(
                False,
                f"{found.task}: methods differ in {found.key} ({_values(found)}), which the study "
                "allows.",
            )
            for found in parity.flagged
        ]
    solved = {found.key for found in parity.declared if found.why == "budget"}
    tuned = {found.key for found in parity.declared if found.why != "budget"}
    rates = "learning rates" if tuned <= {"train.learning_rate"} else "settings"
    parts = [
        f"Recipes compared before the first run: {parity.compared} keys outside the methods equal",
        *([f"{rates} as tuned for each"] if tuned else []),
        *(said for key, said in _SET_FOR_BUDGET.items() if key in solved),
    ]
    return [Check(True, f"{', '.join(parts)}.")]


def _values(found: KeyDifference) -> str:
    return ", ".join(
        f"{method} {'none' if value is None else words(value)}"
        for method, value in found.values.items()
    )


def parity_table(study: StudyRecord) -> Table | None:
    """Return the settings that differ between the methods of a task, without the methods' own."""
    if study.parity is None:
        return None
    tasks: dict[tuple[str, str, str], list[str]] = {}
    for found in study.parity.flagged:
        tasks.setdefault((found.key, "allowed by the study", _values(found)), []).append(found.task)
    for found in study.parity.declared:
        why = "set for the budget" if found.why == "budget" else "tuned by method"
        tasks.setdefault((found.key, why, _values(found)), []).append(found.task)
    if not tasks:
        return None
    every = len(tasks_of(study))
    rows = [
        (key, "all" if len(where) == every > 1 else ", ".join(where), why, values)
        for (key, why, values), where in tasks.items()
    ]
    header = ("recipe key", "tasks", "why", "by method")
    return Table("What differs beside the methods", header, rows, (True, True, True, True))
