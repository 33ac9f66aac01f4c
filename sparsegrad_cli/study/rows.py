"""Summarize runs as rows, one for each task and method, with its scores and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsegrad_cli.methods.registry import BASELINE
from sparsegrad_cli.records.run import MemoryPhase, RunRecord
from sparsegrad_cli.records.study import CellEntry, CellStatus, Difference, ResultRow
from sparsegrad_cli.study.statistics import mean, std, student

TRAIN_STEP = ("forward", "backward", "optimizer")
Read = Callable[[RunRecord], float | None]


def score_of(cell: CellEntry) -> float | None:
    """Return the score of a finished run: on its test set, or else of its best evaluation."""
    if cell.status != "done" or cell.run is None or cell.run.metrics is None:
        return None
    found = cell.run.metrics.reported
    return found.score if found else None


def make_rows(cells: Sequence[CellEntry]) -> list[ResultRow]:
    """Return one row for each task and method, in the order of the runs."""
    groups: dict[tuple[str, str], list[CellEntry]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.method), []).append(cell)
    uses = basis_uses(cells)
    scores = {
        key: {cell.seed: score for cell in group if (score := score_of(cell)) is not None}
        for key, group in groups.items()
    }
    rows = []
    for (task, method), group in groups.items():
        others = [name for there, name in groups if there == task]
        reference = BASELINE if BASELINE in others else others[0]
        difference = None
        if method != reference:
            ours, theirs = scores[task, method], scores[task, reference]
            difference = paired_difference(ours, theirs, reference)
        rows.append(_row(group, scores[task, method], uses, difference))
    return rows


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], against: str
) -> Difference | None:
    """Return the mean difference over the seeds that both have, with its 95 % interval.

    There is no p-value: the few seeds of one task are too few for a test, and the p-values of many
    tasks would need a correction. :mod:`sparsegrad_cli.study.pairs` has the tests.

    Returns:
        The difference, with interval None below two seeds; None if there is no common seed.
    """
    differences = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    if not differences:
        return None
    found = student([differences])
    return Difference(
        against=against,
        mean=mean(differences),
        interval=[found.low, found.high] if found else None,
        n=len(differences),
    )


def basis_uses(cells: Sequence[CellEntry]) -> dict[str, int]:
    """Return the number of finished runs that trained in each basis, by the basis's digest."""
    uses: dict[str, int] = {}
    for cell in cells:
        digest = _digest(cell.run) if cell.run else None
        if digest and cell.status == "done":
            uses[digest] = uses.get(digest, 0) + 1
    return uses


def train_step_peak(run: RunRecord) -> MemoryPhase | None:
    """Return the phase of the training step with the highest peak."""
    there = [phase for name in TRAIN_STEP if (phase := _phase(run, name)) is not None]
    return max(there, key=lambda phase: phase.peak_bytes, default=None)


def held_bytes(run: RunRecord, category: str) -> int | None:
    """Return the maximum of a memory category over the peaks of the training step's phases."""
    phases = [phase for name in TRAIN_STEP if (phase := _phase(run, name)) is not None]
    return max((getattr(phase.categories, category) for phase in phases), default=None)


def _row(
    cells: Sequence[CellEntry],
    by_seed: Mapping[int, float],
    uses: Mapping[str, int],
    difference: Difference | None,
) -> ResultRow:
    """Return a row. Bytes are maxima over seeds; seconds, tokens and ``touched`` are means."""
    runs = [cell.run for cell in cells if cell.run is not None and cell.seed in by_seed]
    first = runs[0] if runs else None
    counts = first.counts if first else None
    scores = list(by_seed.values())
    found = student([scores])
    worst = max(
        (peak for run in runs if (peak := train_step_peak(run))),
        key=lambda phase: phase.peak_bytes,
        default=None,
    )
    step = worst.peak_bytes if worst else None
    weights = _most(runs, _loaded_weights) or 0
    calibration = _most(runs, _calibration_peak) or 0
    rates = _values(runs, lambda run: run.time.steps_per_s if run.time else None)
    seconds = [(run.time.calibrate_s if run.time else None) or 0.0 for run in runs]
    shares = [max(1, uses.get(_digest(run) or "", 1)) for run in runs]
    return ResultRow(
        task=cells[0].task,
        method=cells[0].method,
        seeds_done=len(scores),
        seeds_asked=len(cells),
        status=_status(cells),
        metric=first.task.metric if first and first.task else None,
        positive_label=first.task.positive_label if first and first.task else None,
        score_mean=mean(scores),
        score_std=std(scores),
        score_interval=[found.low, found.high] if found else None,
        scores=list(scores),
        validation_loss_mean=mean(_values(runs, _reported_loss)),
        trainable_targets=counts.trainable_targets if counts else None,
        trainable=counts.trainable if counts else None,
        touched_targets=_mean(runs, lambda run: run.counts and run.counts.touched_targets),
        touched=_mean(runs, lambda run: run.counts and run.counts.touched),
        peak_bytes=step,
        memory_categories=worst.categories if worst else None,
        beyond_weights_bytes=None if step is None else step - weights,
        peak_charged_bytes=None if step is None else max(step, calibration),
        optimizer_state_bytes=_most(runs, lambda run: held_bytes(run, "optimizer_state")),
        saved_activation_bytes=_most(runs, lambda run: held_bytes(run, "saved_activations")),
        adapter_bytes=_most(runs, lambda run: run.sizes and run.sizes.adapter_bytes),
        steps_per_s=mean(rates),
        steps_per_s_iqr=max(rates) - min(rates) if len(rates) > 1 else None,
        train_s=_mean(runs, lambda run: run.time and run.time.train_s),
        # Calibration is charged in full to every run, as if it were the only one, and also divided
        # among all runs that trained in a basis of the same digest, whether they made or read it.
        calibrate_s=mean(seconds),
        calibrate_tokens=_mean(runs, lambda run: run.calibration and run.calibration.tokens),
        calibrate_peak_bytes=calibration,
        basis_uses=max(shares, default=1),
        calibrate_s_per_use=mean([s / n for s, n in zip(seconds, shares, strict=True)]),
        note=_note(cells, first),
        difference=difference,
    )


def _phase(run: RunRecord, name: str) -> MemoryPhase | None:
    return run.memory.phases.get(name) if run.memory else None


def _loaded_weights(run: RunRecord) -> int | None:
    phase = _phase(run, "load")
    return phase.categories.weights if phase else None


def _calibration_peak(run: RunRecord) -> int | None:
    return run.calibration.peak_bytes if run.calibration else None


def _reported_loss(run: RunRecord) -> float | None:
    found = run.metrics.reported if run.metrics else None
    return found.loss if found else None


def _digest(run: RunRecord) -> str | None:
    return run.calibration.digest if run.calibration else None


def _values(runs: Sequence[RunRecord], read: Read) -> list[float]:
    return [value for run in runs if (value := read(run)) is not None]


def _mean(runs: Sequence[RunRecord], read: Callable[[RunRecord], object]) -> float | None:
    return mean([float(v) for run in runs if isinstance(v := read(run), int | float)])


def _most(runs: Sequence[RunRecord], read: Callable[[RunRecord], object]) -> int | None:
    return max((v for run in runs if isinstance(v := read(run), int)), default=None)


def _status(cells: Sequence[CellEntry]) -> CellStatus:
    statuses = [cell.status for cell in cells]
    if all(status == "done" for status in statuses):
        return "done"
    order: tuple[CellStatus, ...] = ("out_of_memory", "failed", "interrupted")
    return next((status for status in order if status in statuses), "pending")


def _note(cells: Sequence[CellEntry], first: RunRecord | None) -> str:
    for cell in cells:
        if cell.error is not None and cell.error.what.strip():
            return cell.error.what.strip().splitlines()[0]
    counts = first.counts if first else None
    if counts is None:
        return ""
    parts = [counts.note]
    if counts.remainder:
        parts.append(f"{counts.remainder:+,} parameters compared with the requested number")
    return "; ".join(part for part in parts if part)
