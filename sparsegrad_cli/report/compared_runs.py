"""Set finished runs side by side: scores, memory, time, and what differs between their recipes.

Nothing is trained or tested. Scores are ranked only if the runs had the same data, seed and metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.records.metric_direction import Scale
from sparsegrad_cli.records.run import MemoryPhase, RunRecord
from sparsegrad_cli.report.document import (
    Block,
    Check,
    Checks,
    Column,
    Commands,
    Document,
    Figure,
    Paragraph,
    Section,
    Table,
    Verdict,
)
from sparsegrad_cli.report.headline import best_so_far
from sparsegrad_cli.report.next_steps import study_of_runs
from sparsegrad_cli.report.run import scale_of_run
from sparsegrad_cli.report.run_charts import score_points
from sparsegrad_cli.report.svg import (
    chart,
    colour,
    few_ticks,
    grid,
    marker,
    plain,
    point_tips,
    subplots,
    whole_steps,
)
from sparsegrad_cli.report.units import (
    NOTHING,
    TRAIN_STEP,
    format_count,
    format_mib,
    format_number,
    format_score,
    format_seconds,
    listed,
    status_words,
    words,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

# Recipe keys that differ between any two runs and say nothing about the result.
_OF_EVERY_RUN = ("output_dir", "train.run_name", "train.report_to")


@dataclass(frozen=True)
class NamedRun:
    """A run with a name of its own.

    Attributes:
        name: the last part of its folder, or the whole folder if another run has the same name.
        folder: as it was typed.
        run: its record.
        recipe: dotted key -> value of the resolved recipe; empty if it cannot be read.
    """

    name: str
    folder: str
    run: RunRecord
    recipe: Mapping[str, Any]


def compared_document(runs: Sequence[NamedRun]) -> Document:
    """Return the page of several runs, in the order in which they were named."""
    reasons = incomparable(runs)
    scale = scale_of_run(runs[0].run)
    return Document(
        title=f"{len(runs)} runs side by side",
        status="done" if all(each.run.status == "done" for each in runs) else "unfinished",
        subtitle=", ".join(each.folder for each in runs),
        lead=[_verdict(runs, reasons, scale), _scores(runs)],
        sections=[
            Section("Learning curves", [_curves(runs, scale)] if _one_metric(runs) else []),
            Section("Memory and time", [_costs(runs)]),
            Section("Differences between the recipes", [_recipes(runs)]),
            Section("What the runs had in common", [Checks(_checks(runs))]),
            Section("What next", [Commands(study_of_runs([each.run for each in runs]))]),
        ],
    )


def incomparable(runs: Sequence[NamedRun]) -> list[str]:
    """Return why the scores of the runs must not be ranked; empty if they may."""
    reasons = [
        f"{each.name} has no score ({status_words(each.run.status)})"
        for each in runs
        if _score(each) is None
    ]
    unfinished = [each.name for each in runs if each.run.status != "done" and _score(each)]
    reasons += [f"not finished: {listed(unfinished)}"] if unfinished else []
    differing: tuple[tuple[str, Callable[[RunRecord], object]], ...] = (
        ("metric", lambda run: run.task and (run.task.metric, run.task.positive_label)),
        ("task", lambda run: run.task and run.task.name),
        ("data", lambda run: run.hashes and run.hashes.data),
        ("seed", lambda run: run.seed),
    )
    for what, value in differing:
        found = {each.name: value(each.run) for each in runs}
        known = {name: held for name, held in found.items() if held is not None}
        if len(set(known.values())) > 1:
            shown = ", ".join(f"{name} {_brief(held)}" for name, held in known.items())
            reasons.append(f"other {what}: {shown}")
        unknown = [each.name for each in runs if each.name not in known and _score(each)]
        if unknown:
            reasons.append(f"{what} not recorded: {listed(unknown)}")
    return reasons


def _brief(value: object) -> str:
    """Return a value of a run, with long digests cut."""
    text = str(value[0]) if isinstance(value, tuple) else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _one_metric(runs: Sequence[NamedRun]) -> bool:
    return len({each.run.task.metric if each.run.task else None for each in runs}) == 1


def _score(each: NamedRun) -> float | None:
    found = each.run.metrics and (each.run.metrics.test or best_so_far(each.run.metrics))
    return found.score if found else None


def _verdict(runs: Sequence[NamedRun], reasons: Sequence[str], scale: Scale) -> Verdict:
    if reasons:
        return Verdict("Not comparable, so no verdict: " + "; ".join(reasons))
    order = sorted(runs, key=lambda r: _score(r) or 0.0, reverse=not scale.lower_is_better)
    shown = ", ".join(f"{each.name} {format_score(_score(each), scale)}" for each in order)
    kind = f" ({scale.words}, lower is better)" if scale.lower_is_better else ""
    return Verdict(
        f"{shown}{kind}; 1 seed: not tested",
        ["One run each cannot show which method is better: compare several seeds."],
    )


# --- tables

_NAME: Column[NamedRun] = Column("run", lambda each: each.name, words=True)


def _scores(runs: Sequence[NamedRun]) -> Table:
    def score(which: str, each: NamedRun) -> str:
        metrics = each.run.metrics
        found = best_so_far(metrics) if which == "best" else metrics and getattr(metrics, which)
        return format_score(found.score if found else None, scale_of_run(each.run))

    def at(each: NamedRun) -> str:
        best = best_so_far(each.run.metrics)
        return format_count(best.step if best else None)

    def baseline(each: NamedRun) -> str:
        task = each.run.task
        return format_score(task.majority_score if task else None, scale_of_run(each.run))

    columns: list[Column[NamedRun]] = [
        _NAME,
        Column("test", partial(score, "test")),
        Column("best", partial(score, "best")),
        Column("at step", at),
        Column("last", partial(score, "final")),
        Column("before training", partial(score, "initial")),
        Column("same answer always", baseline),
        Column("method", lambda each: each.run.method.name if each.run.method else "", words=True),
        Column("metric", lambda each: scale_of_run(each.run).label, words=True),
        Column("seed", lambda each: words(each.run.seed)),
        Column("status", lambda each: status_words(each.run.status), words=True),
    ]
    return Table.of(runs, columns, "Scores on the validation set").without_empty()


def _costs(runs: Sequence[NamedRun]) -> Table:
    def peak(each: NamedRun) -> MemoryPhase | None:
        there = each.run.memory.phases if each.run.memory else {}
        step = [there[name] for name in TRAIN_STEP if name in there]
        return max(step, key=lambda phase: phase.peak_bytes, default=None)

    def memory(each: NamedRun) -> str:
        found = peak(each)
        return format_mib(found.peak_bytes if found else None)

    def beyond(each: NamedRun) -> str:
        found = peak(each)
        load = each.run.memory.phases.get("load") if each.run.memory else None
        known = found is not None and load is not None
        return format_mib(found.peak_bytes - load.categories.weights if known else None)  # type: ignore[union-attr]

    def seconds(key: str, each: NamedRun) -> str:
        return format_seconds(getattr(each.run.time, key) if each.run.time else None)

    def calibrate(each: NamedRun) -> str:
        # Only methods that calibrate leave the block.
        none = each.run.status == "done" and each.run.calibration is None
        return "none" if none else seconds("calibrate_s", each)

    def trainable(each: NamedRun) -> str:
        return format_count(each.run.counts.trainable if each.run.counts else None)

    def speed(each: NamedRun) -> str:
        return format_number(each.run.time.steps_per_s if each.run.time else None)

    columns: list[Column[NamedRun]] = [
        _NAME,
        Column("trainable", trainable),
        Column("peak of a step, MiB", memory),
        Column("beyond the weights, MiB", beyond),
        Column("calibrate", calibrate),
        Column("train", partial(seconds, "train_s")),
        Column("steps/s", speed),
        Column("total", partial(seconds, "total_s")),
    ]
    note = "times compare only if nothing else ran on the machine"
    return Table.of(runs, columns, "Memory and time", [note]).without_empty()


def _recipes(runs: Sequence[NamedRun]) -> Block:
    """Return the keys whose values differ, one column per run."""
    unread = [each.name for each in runs if not each.recipe]
    if unread:
        return Paragraph(f"recipe.yaml cannot be read: {listed(unread)}.", dim=True)
    keys = dict.fromkeys(key for each in runs for key in each.recipe)
    rows = []
    for key in keys:
        values = [_setting(each.recipe.get(key)) for each in runs]
        if len(set(values)) > 1 and key not in _OF_EVERY_RUN:
            rows.append((key, *values))
    if not rows:
        return Paragraph("The recipes are equal except for their folders.")
    header = ("recipe key", *(each.name for each in runs))
    return Table("Keys with other values", header, rows, (True, *(True for _ in runs)))


def _setting(value: object) -> str:
    return NOTHING if value is None else words(value)


def _checks(runs: Sequence[NamedRun]) -> list[Check]:
    """Return what all runs had in common, by the digests that they recorded."""
    kept: tuple[tuple[str, Callable[[RunRecord], object]], ...] = (
        ("base model", lambda run: run.model and run.model.fingerprint),
        ("data", lambda run: run.hashes and run.hashes.data),
        ("initial head", lambda run: run.hashes and run.hashes.head_init),
        ("precision", lambda run: run.number_formats),
        ("order of the batches", _order_of(runs)),
    )
    checks = []
    for what, value in kept:
        found = [value(each.run) for each in runs]
        if None in found:
            checks.append(Check(None, f"Same {what}: not recorded by all runs."))
        else:
            same = len(set(found)) == 1
            checks.append(Check(same, f"{'The same' if same else 'NOT the same'} {what}."))
    return checks


def _order_of(runs: Sequence[NamedRun]) -> Callable[[RunRecord], object]:
    """Return a function to the digest of the batches up to the last step that all runs recorded."""
    orders = [set(each.run.hashes.order) if each.run.hashes else set() for each in runs]
    last = max(set.intersection(*orders), default=None)

    def order(run: RunRecord) -> object:
        return run.hashes.order[last] if run.hashes and last is not None else None

    return order


# --- learning curves


def _curves(runs: Sequence[NamedRun], scale: Scale) -> Figure:
    parts = []
    for each in runs:
        points = score_points(each.run.metrics)
        if points:
            step, score = points[-1]
            parts.append(f"{each.name} ends at {format_score(score, scale)} (step {step:,})")
    return Figure(
        "Validation score over training",
        partial(_draw_curves, runs, scale),
        "One line per run. Runs on other data cannot be ranked by it.",
        f"{scale.label}: {', '.join(parts)}." if parts else "",
        "Scores: not recorded.",
    )


@chart
def _draw_curves(runs: Sequence[NamedRun], scale: Scale) -> Plot | None:
    """Draw the validation score of every run over its steps."""
    figure, (axes,) = subplots(2.8)
    for at, each in enumerate(runs):
        points = [(step, scale.times * score) for step, score in score_points(each.run.metrics)]
        if not points:
            continue
        line = axes.plot(*zip(*points, strict=True), marker=marker(at), ms=3.5, color=colour(at))
        line[0].set_label(plain(each.name))
        texts = [f"{each.name}, step {x:,}: {y:.{scale.digits}f}" for x, y in points]
        point_tips(axes, points, texts)
    if not axes.lines:
        return None
    axes.set(xlabel="optimizer step", ylabel=plain(scale.label))
    whole_steps(axes)
    few_ticks(axes.yaxis)
    grid(axes)
    return figure
