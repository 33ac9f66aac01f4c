"""Draw the conclusions of a study: which methods differ, and whether the comparison is fair."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.study import Check as RunCheck
from sparsegrad_cli.records.study import KeyDifference, PairTest, StudyRecord
from sparsegrad_cli.report.budget import budget_checks
from sparsegrad_cli.report.document import Check, Column, Table
from sparsegrad_cli.report.scores import tasks_of
from sparsegrad_cli.report.tuning import tuning_check
from sparsegrad_cli.report.units import (
    MINUS,
    NOTHING,
    counted,
    format_count,
    format_interval,
    format_p,
    format_score,
    format_share,
    listed,
    words,
)

_MAX_PAIRS = 45  # Ten methods. With more, only the pairs with the smallest p are shown.
_NEEDED = (
    "Seeds needed: the number of seeds that would show the difference with a probability of 80 %, "
    "if further seeds have the same mean and spread (paired t-test at the level divided by the "
    "number of pairs), and that lets the permutation test reach that level at all."
)
_NEEDED_CROSSED = (
    "Of the rows: share of the variance of the difference that is due to the test rows, which more "
    "seeds do not reduce. Seeds needed: the number that would show the difference with a "
    "probability of 80 %, if further seeds have the same mean and spread; none if only more test "
    "rows would."
)
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


# --- differences


def verdict_lines(study: StudyRecord) -> list[str]:
    """Return a sentence per significant difference, and one about the differences that are not."""
    tests = study.tests
    if tests is None:
        return ["Differences: not tested."]
    if tests.reason:
        return [f"No difference is tested: {tests.reason}."]
    if not tests.pairs:
        return [_untested(study)] if tests.untested else []
    level = tests.level or 0.0
    lines = [_inferiority(pair) for pair in tests.pairs if pair.margin is not None]
    differences = [pair for pair in tests.pairs if pair.margin is None]
    shown = [pair for pair in differences if pair.better]
    lines += [_better(pair) for pair in shown]
    rest = len(differences) - len(shown)
    if rest:
        other = "other " if shown else ""
        where = f"any of the {other}{rest} pairs" if rest > 1 else f"the {other or 'one '}pair"
        lines.append(
            f"No difference shown in {where} of methods, which does not mean that there is none "
            f"(level {level:g} over all pairs together)."
        )
    return lines


def _untested(study: StudyRecord) -> str:
    if len(study.seeds) == 1:
        return "n = 1: with one seed, no method is ranked and no difference is tested."
    return (
        "No method is ranked and no difference is tested: no two methods have two finished seeds "
        "of a task in common."
    )


def _inferiority(pair: PairTest) -> str:
    """Return whether a method is shown not to be worse than another by the margin."""
    scale = scale_of(pair.metric)
    evidence = [f"Holm's p {format_p(pair.p_holm)}"]
    if pair.mean is not None:
        interval = format_interval(scale.clip_difference(pair.interval), scale)
        found = f"{format_score(pair.mean, scale, sign=True)}, 95 % interval {interval}"
        evidence.insert(0, f"difference {found}")
    shown = "is" if pair.not_inferior else "is not shown to be"
    margin = format_score(pair.margin, scale)
    return (
        f"{pair.a} {shown} non-inferior to {pair.b} by the margin of {margin} "
        f"({'; '.join(evidence)})."
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
        low, high = scale.clip_difference(pair.interval) or pair.interval
        interval = (low, high) if sign > 0 else (-high, -low)
        evidence.insert(0, f"95 % interval {format_interval(interval, scale)}")
    by = format_score(abs(pair.mean), scale)
    return f"{pair.better} is better than {worse} by {by} ({'; '.join(evidence)})."


def pairs_table(study: StudyRecord) -> Table | None:
    """Return one row per pair of methods: wins, difference, interval and p-values."""
    tests = study.tests
    if tests is None or not tests.pairs:
        return None
    smallest = sorted(tests.pairs, key=lambda pair: pair.p or 0.0)[:_MAX_PAIRS]
    listed = [pair for pair in tests.pairs if pair in smallest]
    crossed = tests.over != "seeds"
    notes = [
        f"p: {tests.test}. Corrected: {tests.correction}.",
        f"t: {tests.check}. The interval is from this test, uncorrected.",
        _NEEDED,
    ]
    if crossed:
        notes = [f"{notes[0]} The interval is from the same test, uncorrected.", _NEEDED_CROSSED]
    if len(listed) < len(tests.pairs):
        notes.append(f"the {len(listed)} of {len(tests.pairs)} pairs with the smallest p")
    columns: list[Column[PairTest]] = [
        Column("pair", lambda pair: f"{pair.a} {MINUS} {pair.b}", words=True),
        Column("runs", lambda pair: str(pair.n)),
        Column("won\u00a0:\u00a0lost", lambda pair: f"{pair.wins} : {pair.losses}"),
        Column("difference", _difference),
        Column("95 % interval", _interval),
        Column("p", lambda pair: format_p(pair.p)),
        Column("p, Holm", lambda pair: format_p(pair.p_holm)),
        Column("of the rows", lambda pair: format_share(pair.examples_share))
        if crossed
        else Column("t, Holm", lambda pair: format_p(pair.p_t_holm)),
        Column("shown", _shown, words=True),
        Column("seeds needed", _seeds_needed),
    ]
    return Table.of(listed, columns, "Pairs of methods over all seeds and tasks", notes)


def _interval(pair: PairTest) -> str:
    scale = scale_of(pair.metric)
    return format_interval(scale.clip_difference(pair.interval), scale)


def _difference(pair: PairTest) -> str:
    if pair.mean is None:
        return NOTHING
    return format_score(pair.mean, scale_of(pair.metric), sign=True)


def _seeds_needed(pair: PairTest) -> str:
    return NOTHING if pair.seeds_needed is None else format_count(pair.seeds_needed)


def _shown(pair: PairTest) -> str:
    if pair.margin is not None:
        margin = format_score(pair.margin, scale_of(pair.metric))
        return f"{'' if pair.not_inferior else 'not shown: '}non-inferior by {margin}"
    return f"{pair.better} better" if pair.better else "no difference shown"


# --- fairness


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
            lines.append(Check(False, f"{where}: methods did NOT have the same {listed(wrong)}."))
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
    lines = [Check(True, f"{pairs}: all methods had the same {listed(known)}{over}.")]
    missing = [word for word in _SAME.values() if word not in known]
    if missing:
        lines.append(Check(None, f"{pairs}: same {listed(missing)}: not recorded."))
    return lines


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
    return Table("Other differences between the recipes", header, rows, (True, True, True, True))
