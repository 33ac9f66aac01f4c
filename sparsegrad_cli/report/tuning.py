"""Show the tuning of a study: the best settings, all trials, and whether it was equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.study import SearchDimension, StudyRecord, Trial, TuningSeries
from sparsegrad_cli.report.document import Check, Column, Table
from sparsegrad_cli.report.scores import tasks_of
from sparsegrad_cli.report.units import (
    NOTHING,
    format_count,
    format_number,
    format_score,
    format_seconds,
    status_words,
    words,
)

_NO_SCORE = ("failed", "out_of_memory")


def settings_words(settings: Mapping[str, object]) -> str:
    """Return settings as text: ``learning_rate 0.0005, warmup_steps 0.1``."""
    return ", ".join(f"{_name(key)} {_value(value)}" for key, value in settings.items())


def _name(key: str) -> str:
    return key.removeprefix("train.")


def _value(value: object) -> str:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(value, 4) if numeric else words(value)  # type: ignore[arg-type]


def outcome_words(trial: Trial) -> str:
    """Return ``score ×100 61.2``, ``pruned, score ×100 48.0 so far`` or ``failed: NaN loss``."""
    scale = scale_of(trial.metric)
    score = "" if trial.score is None else f"{scale.column} {format_score(trial.score, scale)}"
    if trial.status == "done":
        return score or trial.status
    if trial.status == "pruned":
        return f"pruned, {score} so far" if score else "pruned"
    return ": ".join(part for part in (status_words(trial.status), trial.error) if part)


def _series(study: StudyRecord) -> Sequence[TuningSeries]:
    return study.tuning.series if study.tuning else []


def tuning_progress(study: StudyRecord) -> str:
    """Return ``3 of 16 trials of tuning``; empty without tuning or after all trials."""
    asked = study.tuning.trials * len(study.tuning.series) if study.tuning else 0
    there = sum(len(series.trials) for series in _series(study))
    return f"{there} of {asked} trials of tuning" if there < asked else ""


def tuning_lines(study: StudyRecord) -> list[str]:
    """Return warnings: best values at the end of a range, methods without a finished trial."""
    lines = []
    several = len(tasks_of(study)) > 1
    rows: dict[str, list[TuningSeries]] = {}
    for series in _series(study):
        row = f"{series.task}, {series.method}" if several else series.method
        rows.setdefault(row, []).append(series)
    for row, seeds in rows.items():
        found = Counter((edge.key, edge.end) for series in seeds for edge in series.edges)
        for (key, end), count in found.items():
            where = f" for {count} of {len(seeds)} seeds" if len(seeds) > 1 else ""
            lines.append(
                f"{row}: the best {_name(key)} is the {end} that was tried{where}; a better value "
                "may lie beyond it."
            )
        for series in seeds:
            seed = "" if series.seed is None else f", seed {series.seed}"
            if series.trials and all(t.status in _NO_SCORE for t in series.trials):
                lines.append(
                    f"{row}{seed}: every trial failed, so there are no settings to run with."
                )
    return lines


def tuning_check(study: StudyRecord) -> Check | None:
    """Return whether all methods were tuned equally; None without tuning."""
    tuning = study.tuning
    if tuning is None:
        return None
    if {len(series.trials) for series in tuning.series} != {tuning.trials}:
        return Check(None, f"Tuning of {tuning.trials} trials per method and task: not done yet.")
    seeds = f"on seeds that are not reported ({', '.join(map(str, tuning.seeds))})"
    if tuning.own_seeds:
        seeds = "for each seed by itself, by held-out training rows; the test set chose nothing"
    return Check(
        True,
        f"{tuning.trials} trials of tuning for every method on every task, over equally wide "
        f"spaces, {seeds}.",
    )


def tuning_table(study: StudyRecord) -> Table | None:
    """Return one row per method and task: trials, the best settings, their score, the time."""
    tuning = study.tuning
    if tuning is None or not tuning.series:
        return None
    columns: list[Column[TuningSeries]] = [
        Column("task", lambda series: series.task, words=True),
        Column("method", lambda series: series.method, words=True),
        *_seed_column(study, lambda series: series),
        Column("best settings", _best_settings, words=True),
        Column("space", _space, words=True),
        Column("trials", _trial_counts),
        Column("score", _best_score),
        Column("time", lambda series: format_seconds(series.seconds)),
    ]
    where = f"on seed {', '.join(map(str, tuning.seeds))}, by the best validation score"
    if tuning.own_seeds:
        where = "of each seed, by the best score on held-out training rows"
    caption = f"Tuning {where}"
    notes = [f"{tuning.sampler}. Pruned: {tuning.pruner}.", *tuning_lines(study)]
    several = len(tasks_of(study)) > 1
    return Table.of(tuning.series, columns if several else columns[1:], caption, notes)


def _seed_column(study: StudyRecord, series_of: Callable[[Any], TuningSeries]) -> list[Column[Any]]:
    """Return the column of the seed, if every seed is tuned by itself."""
    if study.tuning is None or not study.tuning.own_seeds:
        return []
    return [Column("seed", lambda row: words(series_of(row).seed))]


def _best_settings(series: TuningSeries) -> str:
    return settings_words(series.best.settings) if series.best else NOTHING


def _best_score(series: TuningSeries) -> str:
    return format_score(series.best.score, scale_of(series.metric)) if series.best else NOTHING


def _space(series: TuningSeries) -> str:
    """Return ``0.0002 and 0.02; warmup_steps 0 and 0.2``: first the learning rate, without name."""
    return "; ".join(
        _ends(dimension) if at == 0 else f"{_name(dimension.key)} {_ends(dimension)}"
        for at, dimension in enumerate(series.space)
    )


def _ends(dimension: SearchDimension) -> str:
    if dimension.low is None or dimension.high is None:
        return ", ".join(map(words, dimension.choices or []))
    return f"{format_number(dimension.low, 4)} and {format_number(dimension.high, 4)}"


def _trial_counts(series: TuningSeries) -> str:
    """Return the number of trials: ``8 (2 pruned, 1 failed)``."""
    found = Counter(trial.status for trial in series.trials)
    other = [
        f"{count} {status_words(status)}" for status, count in found.items() if status != "done"
    ]
    return f"{len(series.trials)} ({', '.join(other)})" if other else f"{len(series.trials)}"


def trials_table(study: StudyRecord) -> Table | None:
    """Return every trial of tuning; those whose settings are used are bold."""
    trials = [(series, trial) for series in _series(study) for trial in series.trials]

    def best(row: tuple[TuningSeries, Trial]) -> bool:
        return row[0].best is not None and row[0].best.number == row[1].number

    def score(row: tuple[TuningSeries, Trial]) -> str:
        score = row[1].score
        return NOTHING if score is None else format_score(score, scale_of(row[0].metric))

    columns: list[Column[tuple[TuningSeries, Trial]]] = [
        Column("task", lambda row: row[0].task, words=True),
        Column("method", lambda row: row[0].method, words=True),
        *_seed_column(study, lambda row: row[0]),
        Column("trial", lambda row: str(row[1].number + 1), words=True),
        Column("settings", lambda row: settings_words(row[1].settings), words=True, strong=best),
        Column("status", lambda r: r[1].error or status_words(r[1].status), words=True),
        Column("score", score, strong=best),
        Column("loss", lambda r: NOTHING if r[1].loss is None else format_number(r[1].loss)),
        Column("steps", lambda row: format_count(row[1].steps)),
        Column("time", lambda row: format_seconds(row[1].seconds)),
    ]
    notes = ["score and loss of a pruned trial are the best until it was stopped"]
    caption = "Trials of tuning"
    return Table.of(trials, columns, caption, notes, folded="Every trial") if trials else None
