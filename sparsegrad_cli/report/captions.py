"""Write the captions of figures from the numbers that the figures show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import MemoryCategories, MetricsBlock, RunRecord, SparsityBlock
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.headline import best_so_far
from sparsegrad_cli.report.run_charts import Points, score_points
from sparsegrad_cli.report.scores import methods_of, rows_of, scale_of_rows
from sparsegrad_cli.report.study_charts import (
    changed_shares,
    first_maps,
    mean_curve,
    phase_bars,
    seed_curves,
)
from sparsegrad_cli.report.trends import Trend, trend_of
from sparsegrad_cli.report.units import (
    CATEGORIES,
    counted,
    format_bytes,
    format_number,
    format_score,
    format_share,
    listed,
)

_RULE = (
    "The last third of the evaluations is compared with as many before; changes below 10 % of the "
    "curve's range count as flat."
)
_TOO_FEW = "too few evaluations to see a trend (train.eval_steps: evaluate more often)"
_ADVICE = {
    "improves": "Still improving at the end: {}. Longer training may raise the score.",
    "flat": "Flat at the end: {}.",
    "worse": "Worse at the end than before: {}. Fewer steps or a lower learning rate may help.",
}


# --- one run


def learning_caption(run: RunRecord, scale: Scale) -> str:
    """Return how the validation score of a run ends."""
    points = score_points(run.metrics)
    ring = " The ring marks the model that was kept." if _kept(run.metrics) else ""
    trend = trend_of(points, lower_is_better=scale.lower_is_better)
    if trend is None:
        return f"{counted(len(points), 'evaluation')}: {_TOO_FEW}.{ring}"
    return f"{_ending(trend, scale)} {_RULE}{ring}"


def _kept(metrics: MetricsBlock | None) -> bool:
    return metrics is not None and metrics.best is not None


def _ending(trend: Trend, scale: Scale) -> str:
    if trend.length == 1:
        figures = f"{_shown(trend.last, scale)} after {_shown(trend.before, scale)}"
    else:
        figures = (
            f"the last {trend.length} evaluations average {_shown(trend.last, scale)}, the "
            f"{trend.length} before them {_shown(trend.before, scale)}"
        )
    return _ADVICE[trend.direction].format(figures)


def _shown(value: float, scale: Scale) -> str:
    return format_score(value, scale)


def learning_alt(run: RunRecord, scale: Scale) -> str:
    """Return the first, the best and the last score of a run in words."""
    points = score_points(run.metrics)
    if not points:
        return ""
    (first, start), (last, end) = points[0], points[-1]
    best = best_so_far(run.metrics)
    words = (
        f"{scale.label}: {format_score(start, scale)} at step {first:,}, {format_score(end, scale)}"
        f" at step {last:,}"
    )
    if best is None or best.score is None:
        return f"{words}."
    return f"{words}; best {format_score(best.score, scale)} at step {best.step:,}."


def loss_caption(run: RunRecord) -> str:
    """Return how the losses end, and whether the run overfits."""
    training, validation = loss_points(run.metrics)
    fitted, held_out = (trend_of(each, lower_is_better=True) for each in (training, validation))
    regression = run.task is not None and run.task.regression
    kind = "Mean squared error." if regression else "Cross-entropy."
    if not validation:
        return f"{kind} The run was not evaluated."
    lowest = min(validation, key=lambda point: point[1])
    words = (
        f"{kind} The validation loss is lowest at step {lowest[0]:,} ({format_number(lowest[1])})"
    )
    if lowest == validation[-1]:
        return f"{words}, the last evaluation."
    words += f" and ends at {format_number(validation[-1][1])}."
    falls = fitted is not None and fitted.direction == "improves"
    if falls and held_out is not None and held_out.direction == "worse":
        words += " It rises while the training loss falls: the model overfits."
    return words


def loss_alt(metrics: MetricsBlock | None) -> str:
    """Return the first and last losses in words."""
    names = ("Training loss", "validation loss")
    parts = [
        f"{name} {format_number(points[0][1])} at step {points[0][0]:,}, "
        f"{format_number(points[-1][1])} at step {points[-1][0]:,}"
        for name, points in zip(names, loss_points(metrics), strict=True)
        if points
    ]
    return f"{'; '.join(parts)}." if parts else ""


def loss_points(metrics: MetricsBlock | None) -> tuple[Points, Points]:
    """Return (step, loss) of training and of the validation set."""
    metrics = metrics or MetricsBlock()
    training = [(one.step, one.loss) for one in metrics.train if one.loss is not None]
    validation = [(one.step, one.loss) for one in metrics.history if one.loss is not None]
    return training, validation


def memory_alt(bars: Sequence[tuple[str, MemoryCategories]]) -> str:
    """Return the largest bar of a memory figure, and its largest category.

    Args:
        bars: (label, bytes) of every bar.
    """
    found = [(label, {key: getattr(of, key) for key in CATEGORIES}) for label, of in bars]
    if not found:
        return ""
    label, sizes = max(found, key=lambda bar: sum(bar[1].values()))
    largest = max(sizes, key=lambda key: sizes[key])
    return (
        f"Largest peak: {label}, {format_bytes(sum(sizes.values()))}, of which "
        f"{format_bytes(sizes[largest])} {CATEGORIES[largest]}."
    )


def changed_alt(maps: Sequence[tuple[str, SparsityBlock]]) -> str:
    """Return the changed share of each matrix in words, with its largest block.

    Args:
        maps: (name, map) of every matrix; one matrix needs no name.
    """
    parts = []
    for name, block in maps:
        shares = [share for row in block.map for share in row if share is not None]
        if shares:
            mean, most = format_share(fmean(shares)), format_share(max(shares))
            parts.append(f"{name} {mean} of {block.target}, at most {most} in a block".strip())
    return f"Changed parameters: {'; '.join(parts)}." if parts else ""


# --- studies


def scores_alt(study: StudyRecord, task: str) -> str:
    """Return the mean score of every method in words."""
    rows = [row for row in rows_of(study, task) if row.score_mean is not None]
    scale = scale_of_rows(rows)
    words = ", ".join(f"{row.method} {format_score(row.score_mean, scale)}" for row in rows)
    return f"{scale.label}: {words}."


def curves_caption(study: StudyRecord, task: str) -> str:
    """Return which methods still improve at the end, which are flat, and which get worse."""
    found: dict[str, list[str]] = {}
    for method, trend in method_trends(study, task).items():
        found.setdefault(trend.direction if trend else "few", []).append(method)
    lines = [words.format(listed(found[key])) for key, words in _ADVICE.items() if key in found]
    if "few" in found:
        lines.append(f"{listed(found['few'])}: {_TOO_FEW}.")
    several = any(len(seed_curves(study, task, method)) > 1 for method in methods_of(study))
    lines += ["Thick: mean over seeds; thin: single seeds."] if several else []
    return " ".join([*lines, _RULE] if len(found) > ("few" in found) else lines)


def curves_alt(study: StudyRecord, task: str) -> str:
    """Return the last mean score of every method, and how the curves end."""
    scale = scale_of_rows(rows_of(study, task))
    parts = []
    for method in methods_of(study):
        points = mean_curve(seed_curves(study, task, method))
        if points:
            step, score = points[-1]
            parts.append(f"{method} ends at {format_score(score, scale)} (step {step:,})")
    return f"{scale.label}: {', '.join(parts)}. {curves_caption(study, task)}" if parts else ""


def method_trends(study: StudyRecord, task: str) -> dict[str, Trend | None]:
    """Return how the mean curve of each method ends; None if it has too few points."""
    lower = scale_of_rows(rows_of(study, task)).lower_is_better
    curves = {method: seed_curves(study, task, method) for method in methods_of(study)}
    return {
        method: trend_of(mean_curve(found), lower_is_better=lower)
        for method, found in curves.items()
        if found
    }


def memory_score_alt(study: StudyRecord, task: str) -> str:
    """Return the score and the memory of every method in words."""
    rows = [r for r in rows_of(study, task) if r.score_mean is not None and r.beyond_weights_bytes]
    scale = scale_of_rows(rows)
    parts = [
        f"{row.method} {format_score(row.score_mean, scale)} with "
        f"{format_bytes(row.beyond_weights_bytes)}"
        for row in rows
    ]
    return f"{scale.label} and peak beyond the weights: {', '.join(parts)}."


def budget_alt(study: StudyRecord, task: str) -> str:
    """Return the smallest budget that every method fits, in words."""
    rows = [r for r in rows_of(study, task) if r.score_mean is not None and r.peak_charged_bytes]
    scale = scale_of_rows(rows)
    parts = [
        f"{row.method} needs {format_bytes(row.peak_charged_bytes)} for "
        f"{format_score(row.score_mean, scale)}"
        for row in sorted(rows, key=lambda row: row.peak_charged_bytes or 0)
    ]
    return f"{', '.join(parts)}."


def speed_alt(study: StudyRecord, task: str) -> str:
    """Return the speed of every method in words."""
    rows = [row for row in rows_of(study, task) if row.steps_per_s is not None]
    parts = [f"{row.method} {format_number(row.steps_per_s)}" for row in rows]
    return f"Optimizer steps per second: {', '.join(parts)}."


def method_memory_alt(study: StudyRecord, task: str) -> str:
    """Return the method with the largest peak of a training step in words."""
    rows = rows_of(study, task)
    return memory_alt([(r.method, r.memory_categories) for r in rows if r.memory_categories])


def phase_memory_alt(study: StudyRecord, task: str) -> str:
    """Return the phase and method with the largest peak in words."""
    return memory_alt(phase_bars(study, task))


def changed_maps_alt(study: StudyRecord, task: str) -> str:
    """Return the changed share of the middle target by method in words."""
    return changed_alt(first_maps(study, task))


def changed_targets_alt(study: StudyRecord, task: str) -> str:
    """Return the range of changed shares over the target modules by method in words."""
    parts = [
        f"{row.method} {format_share(min(found.values()))} to {format_share(max(found.values()))}"
        for row in rows_of(study, task)
        if (found := changed_shares(study, row))
    ]
    return f"Changed share of a target module: {', '.join(parts)}." if parts else ""
