"""What a run's record says, as facts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.records.metric_direction import Scale, scale_of
from sparsegrad_cli.report.access import block, dig, items, mappings, number, text
from sparsegrad_cli.report.labels import (
    CATEGORIES,
    PHASES,
    TIMES,
    TRAIN_STEP,
    method_words,
)
from sparsegrad_cli.report.tables import Cell, Fact, Table
from sparsegrad_cli.report.units import (
    MIB,
    NOT_RECORDED,
    format_bytes,
    format_count,
    format_mib,
    format_number,
    format_score,
    format_seconds,
    format_share,
)


def title_of(record: Any) -> str:
    """The name of a run or comparison."""
    return text(record, "name") or "unnamed"


def subtitle(run: Any) -> str:
    """Task, model, method and seed in one line."""
    parts = [text(run, "task", "name"), text(run, "model", "name"), method_words(run)]
    if text(run, "seed"):
        parts.append(f"seed {text(run, 'seed')}")
    return " · ".join(part for part in parts if part)


def scale_of_run(run: Any) -> Scale:
    """The scale of a run's scores, which names the class that they are of."""
    return scale_of(text(run, "task", "metric"), text(run, "task", "positive_label"))


def train_step_peak(run: Any) -> tuple[str, float, Mapping[str, Any]] | None:
    """(phase, bytes, categories) of the training step's phase with the highest peak."""
    found = []
    for phase in TRAIN_STEP:
        there = block(run, "memory", "phases", phase)
        peak = number(there, "peak_bytes")
        if peak is not None:
            found.append((phase, peak, block(there, "categories")))
    return max(found, key=lambda item: item[1], default=None)


def facts(run: Any) -> list[Fact]:
    """The headline figures of a training run."""
    shown = [_score(run), _loss(run), _trainable(run), _peak(run), _speed(run), _calibration(run)]
    shown.append(Fact("Adapter on disk", format_bytes(number(run, "sizes", "adapter_bytes"))))
    sent = number(run, "sizes", "gradient_bytes_per_step")
    if sent is not None:
        shown.append(Fact("Gradients sent per step and process", format_bytes(sent)))
    return shown


def _score(run: Any) -> Fact:
    best, scale = number(run, "metrics", "best", "score"), scale_of_run(run)
    parts = [scale.label]
    for label, keys in (
        ("majority class", ("task", "majority_score")),
        ("before training", ("metrics", "initial", "score")),
        ("last", ("metrics", "final", "score")),
    ):
        value = number(run, *keys)
        if value is not None:
            parts.append(f"{label} {format_score(value, scale)}")
    step, steps = number(run, "metrics", "best", "step"), number(run, "time", "steps")
    if step is not None:
        parts.append(f"at step {step:,.0f}" + (f" of {steps:,.0f}" if steps is not None else ""))
    return Fact("Best validation score", format_score(best, scale), "; ".join(parts))


def _loss(run: Any) -> Fact:
    if text(run, "task", "kind") == "chat":
        return _perplexity(run)
    last = number(run, "metrics", "final", "loss")
    detail = f"last {format_number(last)}" if last is not None else ""
    return Fact("Validation loss", format_number(number(run, "metrics", "best", "loss")), detail)


def _perplexity(run: Any) -> Fact:
    """Of a language model, whose score is its loss."""

    def value(when: str, metric: str) -> float | None:
        splits = block(run, "metrics", when, "values")
        return number(block(splits, next(iter(splits), "")), metric)

    parts = []
    for label, when in (("before training", "initial"), ("last", "final")):
        if value(when, "perplexity") is not None:
            parts.append(f"{label} {format_number(value(when, 'perplexity'))}")
    plain = {
        when: number(block(run, "metrics", when, "values", "plain text"), "loss")
        for when in ("initial", "best")
    }
    if plain["initial"] is not None and plain["best"] is not None:
        change = plain["best"] - plain["initial"]
        parts.append(
            f"plain text {format_number(plain['best'])} in loss, {change:+.3f} by training"
        )
    accuracy = value("best", "token_accuracy")
    if accuracy is not None:
        parts.append(f"next token right {format_share(accuracy)}")
    return Fact("Perplexity", format_number(value("best", "perplexity")), "; ".join(parts))


def _trainable(run: Any) -> Fact:
    counts = block(run, "counts")
    parts = [
        f"{label} {format_count(number(counts, key))}"
        for label, key in (
            ("targets", "trainable_targets"),
            ("head", "trainable_head"),
            ("rest", "trainable_rest"),
        )
        if number(counts, key) is not None
    ]
    total, trainable = number(counts, "model_parameters"), number(counts, "trainable")
    if total and trainable is not None:
        parts.insert(0, f"{format_share(trainable / total)} of the model")
    return Fact("Trainable entries", format_count(trainable), "; ".join(parts))


def _peak(run: Any) -> Fact:
    peak = train_step_peak(run)
    label = "Peak memory, training step"
    if peak is None:
        whole = number(run, "memory", "peak_bytes")
        return Fact(label, format_bytes(whole), text(run, "memory", "peak_phase") or "")
    phase, count, _ = peak
    weights = number(run, "memory", "phases", "load", "categories", "weights")
    parts = [f"in {phase}"]
    if weights is not None:
        parts.append(f"{format_bytes(count - weights)} beyond the weights")
    reserved = number(run, "memory", "phases", phase, "reserved_bytes")
    if reserved is not None:
        parts.append(f"{format_bytes(reserved)} reserved")
    return Fact(label, format_bytes(count), "; ".join(parts))


def _speed(run: Any) -> Fact:
    clock = block(run, "time")
    rate = number(clock, "steps_per_s")
    parts = []
    if number(clock, "examples_per_s") is not None:
        parts.append(f"{format_number(number(clock, 'examples_per_s'))} examples/s")
    if number(clock, "step_median_s") is not None:
        iqr = number(clock, "step_iqr_s")
        spread = f", IQR {format_seconds(iqr)}" if iqr is not None else ""
        parts.append(f"median step {format_seconds(number(clock, 'step_median_s'))}{spread}")
    value = NOT_RECORDED if rate is None else f"{format_number(rate)} steps/s"
    return Fact("Speed", value, "; ".join(parts))


def _calibration(run: Any) -> Fact:
    found = block(run, "calibration")
    if not found:
        seconds = number(run, "time", "calibrate_s")
        value = format_seconds(seconds) if seconds else "none"
        return Fact("Calibration", value, "" if seconds else "no basis to make")
    parts = []
    if dig(found, "reused") is True:
        parts.append("basis reused, made before this run")
    if number(found, "steps") is not None:
        parts.append(f"{format_count(number(found, 'steps'))} steps")
    if number(found, "peak_bytes") is not None:
        parts.append(f"peak {format_bytes(number(found, 'peak_bytes'))}")
    return Fact("Calibration", format_seconds(number(found, "seconds")), "; ".join(parts))


def memory_table(run: Any) -> Table | None:
    """Peak of every phase by category, MiB; None where nothing was recorded."""
    rows: list[tuple[Cell, ...]] = []
    for phase, there in memory_phases(run):
        cells: list[Cell] = [phase]
        cells += [format_mib(number(there, "categories", key)) for key in CATEGORIES]
        cells += [format_mib(number(there, key)) for key in ("peak_bytes", "reserved_bytes")]
        rss = number(there, "rss_bytes")  # as coarse as it is: other libraries are in it
        cells.append(None if rss is None else f"{rss / MIB:.0f}")
        rows.append(tuple(cells))
    if not rows:
        return None
    notes = []
    how = text(run, "memory", "how")
    if how:
        notes.append(f"{text(run, 'memory', 'device') or 'device'}: {how}")
    shape = [format_count(number(side)) for side in items(run, "memory", "batch_shape")]
    if shape:
        notes.append(f"measured on batches of at most {' × '.join(shape)}")
    header = ("phase", *CATEGORIES.values(), "peak", "reserved", "RSS")
    caption = "Memory at the peak of each phase, MiB"
    return Table(caption, header, rows, notes=notes).without_empty()


def memory_phases(run: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The phases with a recorded peak, in the order they happen."""
    there = block(run, "memory", "phases")
    names = [*PHASES, *sorted(str(name) for name in there if name not in PHASES)]
    known = [name for name in names if number(there, name, "peak_bytes") is not None]
    return [(printable_line(name), block(there, name)) for name in known]


def times(run: Any) -> list[tuple[str, float]]:
    """(phase, seconds) of what a run spent its time on, what is left over last."""
    clock = block(run, "time")
    found = []
    for key, label in TIMES.items():
        seconds = number(clock, key)
        if seconds:
            found.append((label, seconds))
    total = number(clock, "total_s")
    if found and total is not None:
        rest = total - sum(seconds for _, seconds in found)
        if rest > 0.01 * total:
            found.append(("everything else", rest))
    return found


def time_line(run: Any) -> str | None:
    """All of :func:`times` in one line, with the total."""
    parts = [f"{label} {format_seconds(seconds)}" for label, seconds in times(run)]
    total = number(run, "time", "total_s")
    if total is not None:
        parts.append(f"total {format_seconds(total)}")
    return " · ".join(parts) or None


def targets_table(run: Any) -> Table | None:
    """What trains in every target."""
    rows: list[tuple[Cell, ...]] = []
    for target in mappings(run, "counts", "targets"):
        out, wide = number(target, "out_features"), number(target, "in_features")
        shape = f"{out:,.0f} × {wide:,.0f}" if out is not None and wide is not None else None
        entries = number(target, "entries")
        share = None
        if entries is not None and out and wide:
            share = format_share(entries / (out * wide))
        count = format_count(entries) if entries is not None else None
        names = (text(target, "name"), text(target, "kind"))
        rows.append((*names, text(target, "block"), shape, count, share))
    if not rows:
        return None
    header = ("target", "kind", "block", "out × in", "trainable", "share")
    return Table("Trainable entries by target", header, rows, left=2)


def notes_of(run: Any) -> list[str]:
    """Everything a reader should know, from the task, the counts and the metrics."""
    found = [text(note) for note in items(run, "task", "notes")]
    found.append(text(run, "counts", "note"))
    found += [text(note) for note in items(run, "metrics", "notes")]
    return list(dict.fromkeys(note for note in found if note))
