"""What a row took: entries, bytes, seconds and tokens, calibration charged to whoever needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import block, number, text
from sparsegrad_cli.study.statistics import mean

TRAIN_STEP = ("forward", "backward", "optimizer")
Run = Mapping[str, Any]


def costs_of(runs: Sequence[Run], uses: Mapping[str, int]) -> dict[str, Any]:
    """The counters of one row.

    Bytes are the most of any seed, seconds and tokens are means, ``touched`` is a mean that may be
    no whole number.

    Args:
        runs: of the finished cells.
        uses: digest of a basis to how many cells of the comparison trained in it.
    """
    peaks = [peak for peak in map(train_step_peak, runs) if peak]
    worst = max(peaks, key=lambda phase: phase["peak_bytes"], default=None)
    step = int(worst["peak_bytes"]) if worst else None
    calibration = _most(runs, "calibration", "peak_bytes") or 0
    weights = _most(runs, "memory", "phases", "load", "categories", "weights") or 0
    rates = _numbers(runs, "time", "steps_per_s")
    first: Run = runs[0] if runs else {}
    return {
        "trainable_targets": _whole(first, "counts", "trainable_targets"),
        "trainable": _whole(first, "counts", "trainable"),
        "touched_targets": mean(_numbers(runs, "counts", "touched_targets")),
        "touched": mean(_numbers(runs, "counts", "touched")),
        "peak_bytes": step,
        "memory_categories": dict(block(worst, "categories")) if worst else None,
        "beyond_weights_bytes": None if step is None else step - weights,
        "peak_charged_bytes": None if step is None else max(step, calibration),
        "optimizer_state_bytes": _held(runs, "optimizer_state"),
        "saved_activation_bytes": _held(runs, "saved_activations"),
        "adapter_bytes": _most(runs, "sizes", "adapter_bytes"),
        "steps_per_s": mean(rates),
        "steps_per_s_iqr": max(rates) - min(rates) if len(rates) > 1 else None,
        "train_s": mean(_numbers(runs, "time", "train_s")),
        **_calibration(runs, uses, calibration),
    }


def train_step_peak(run: Run) -> Mapping[str, Any] | None:
    """The phase of the training step with the highest peak."""
    phases = [block(run, "memory", "phases", name) for name in TRAIN_STEP]
    there = [phase for phase in phases if number(phase, "peak_bytes") is not None]
    return max(there, key=lambda phase: phase["peak_bytes"], default=None)


def _calibration(runs: Sequence[Run], uses: Mapping[str, int], peak_bytes: int) -> dict[str, Any]:
    """Charged whole to every run, as if it were the only one; and shared among a basis's users.

    A run is a user of a basis if it trained in one of equal digest, whether it made that itself or
    read it from a file.
    """
    seconds = [number(run, "time", "calibrate_s") or 0.0 for run in runs]
    shares = [max(1, uses.get(text(run, "calibration", "digest") or "", 1)) for run in runs]
    tokens = _numbers(runs, "calibration", "tokens")
    return {
        "calibrate_s": mean(seconds),
        "calibrate_tokens": mean(tokens),
        "calibrate_peak_bytes": peak_bytes,
        "basis_uses": max(shares, default=1),
        "calibrate_s_per_use": mean([s / n for s, n in zip(seconds, shares, strict=True)]),
    }


def _held(runs: Sequence[Run], category: str) -> int | None:
    """The most of a category at the peak of any phase of the training step."""
    found = [_most(runs, "memory", "phases", p, "categories", category) for p in TRAIN_STEP]
    return max((value for value in found if value is not None), default=None)


def _most(runs: Sequence[Run], *keys: str) -> int | None:
    values = _numbers(runs, *keys)
    return int(max(values)) if values else None


def _numbers(runs: Sequence[Run], *keys: str) -> list[float]:
    return [value for value in (number(run, *keys) for run in runs) if value is not None]


def _whole(run: Run, *keys: str) -> int | None:
    value = number(run, *keys)
    return None if value is None else int(value)
