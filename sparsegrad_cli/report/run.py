"""Build the report of a training or calibration run."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegrad_cli.records.metric_direction import Scale, scale_of
from sparsegrad_cli.records.run import (
    CountsBlock,
    ErrorBlock,
    Evaluation,
    MemoryBlock,
    MemoryPhase,
    MethodBlock,
    MetricsBlock,
    ParameterGroup,
    RunRecord,
    SizesBlock,
    TargetCounts,
    TaskBlock,
    TimeBlock,
)
from sparsegrad_cli.report import captions, run_charts
from sparsegrad_cli.report.calibration import (
    calibration_blocks,
    calibration_facts,
    energy_by_kind,
    spectra_table,
    support_energy,
)
from sparsegrad_cli.report.document import (
    Block,
    Bullets,
    Column,
    Commands,
    Document,
    Drawing,
    Fact,
    Facts,
    Figure,
    Labelled,
    Paragraph,
    Section,
    Table,
    Verdict,
)
from sparsegrad_cli.report.evaluations import samples_table, sets_table, sources_table
from sparsegrad_cli.report.headline import best_so_far, calibration_headline, run_headline
from sparsegrad_cli.report.next_steps import calibration_next, run_next, use_commands
from sparsegrad_cli.report.provenance import hashes_table, provenance
from sparsegrad_cli.report.units import (
    CATEGORIES,
    NOT_RECORDED,
    TRAIN_STEP,
    counted,
    format_bytes,
    format_count,
    format_mib,
    format_number,
    format_score,
    format_seconds,
    format_share,
    words,
)

_PHASES = ("load", "calibrate", "energy", "forward", "backward", "optimizer", "evaluate")
_TIMES = {
    "load_s": "load",
    "calibrate_s": "calibrate",
    "diagnostics_s": "diagnose the basis",
    "train_s": "train",
    "evaluate_s": "evaluate",
}

_MEMORY = (
    "What was in memory when each phase peaked. Forward, backward and optimizer make up a training "
    "step; the highest of the three decides whether it fits. RSS, in the table, is the memory of "
    "the whole process, including libraries."
)
_TIME = "Where the time went. Calibration is part of the cost of a method and is charged to it."
_TOUCHED = (
    "Where the parameters lie that changed in any step: the share of each block of one matrix, "
    "either a core sorted by singular value or the weight itself."
)
_MAX_SPECTRA = 8  # Rows on a terminal.
_MAX_NOTES = 6  # Notes on a terminal.


def run_document(run: RunRecord) -> Document:
    """Return the whole report of a run."""
    trained = run.command != "calibrate"
    scale = scale_of_run(run)
    verdict = run_headline(run, scale) if trained else calibration_headline(run)
    figures = Facts("Figures", facts(run)) if trained else Facts("Cost", calibration_facts(run))
    return heading(
        run,
        lead=[Verdict(verdict), figures],
        sections=[
            Section("Learning", _learning(run) if trained else []),
            Section("Calibration", calibration_blocks(run, with_facts=trained)),
            Section("Memory", _memory(run)),
            Section("Time", _time(run)),
            Section("Trainable parameters", _parameters(run)),
            run_next(run, scale) if trained else calibration_next(run),
            Section("Notes", [Bullets(notes_of(run))]),
            Section("Provenance", [provenance(run), hashes_table(run)]),
        ],
    )


def run_screen(run: RunRecord) -> Document:
    """Return a run for the terminal: headline figures, memory, time, notes and how to use it."""
    if run.command == "calibrate":
        return _calibration_screen(run)
    lead: list[Block | None] = [Verdict(run_headline(run, scale_of_run(run)))]
    lead.append(Facts("Figures", facts(run)))
    lead.append(memory_table(run) or Paragraph("Memory: not recorded", dim=True))
    lead.append(Labelled("Time", time_line(run)))
    lead.append(support_energy(run) or energy_by_kind(run))
    lead += short_notes(notes_of(run))
    if run.status == "done" and run.output_dir:
        lead.append(Commands(use_commands(run, run.output_dir)))
    return heading(run, lead=lead)


def _calibration_screen(run: RunRecord) -> Document:
    found = calibration_facts(run)
    lead: list[Block | None] = [
        Verdict(calibration_headline(run)),
        Facts("Cost", found) if found else Paragraph("Calibration: not recorded", dim=True),
        support_energy(run) or energy_by_kind(run) or Paragraph("Energy: not recorded", dim=True),
        spectra_table(run, most=_MAX_SPECTRA),
        Labelled("Time", time_line(run)),
    ]
    return heading(run, lead=[*lead, *short_notes(notes_of(run))])


def heading(
    run: RunRecord, *, lead: Sequence[Block | None], sections: Sequence[Section] = ()
) -> Document:
    """Return a document with the name, status and error of a run."""
    method = method_words(run.method) if run.method else None
    parts = [run.task and run.task.name, run.model and run.model.name, method]
    parts += [f"seed {run.seed}"] if run.seed is not None else []
    return Document(
        title=run.name or "unnamed",
        status=run.status,
        subtitle=" · ".join(part for part in parts if part),
        error=error_lines(run.error),
        lead=lead,
        sections=sections,
    )


def method_words(method: MethodBlock) -> str:
    """Return ``sparsegrad (rotated form, dynamic support, density 0.01, scope head)``."""
    parts = [f"{value} {key}" for key in ("form", "support") if (value := getattr(method, key))]
    entries = method.settings.get("entries")
    parts += [f"{entries:,} parameters"] if isinstance(entries, int) else []
    parts += [f"density {method.density}"] if method.density is not None else []
    parts += [f"scope {method.scope}"] if method.scope else []
    return f"{method.name} ({', '.join(parts)})" if parts else method.name


def error_lines(error: ErrorBlock | None) -> list[tuple[str, str]]:
    """Return the recorded details of an error as (label, text)."""
    if error is None:
        return []
    found = (("what", error.what), ("where", error.where), ("fix", error.fix))
    return [(label, text) for label, text in found if text]


def short_notes(notes: Sequence[str]) -> list[Block]:
    """Return the first notes for a terminal, and the number of the others."""
    shown: list[Block] = [Labelled("note", note) for note in notes[:_MAX_NOTES]]
    more = len(notes) - _MAX_NOTES
    if more > 0:
        shown.append(Paragraph(f"and {more} more notes in the report", dim=True))
    return shown


# --- headline figures


def facts(run: RunRecord) -> list[Fact]:
    """Return the headline figures of a training run."""
    sizes = run.sizes or SizesBlock()
    measured = [_score(run), _loss(run), _trainable(run), _peak(run), _speed(run)]
    found = [*measured, _calibration(run)]
    best = run.metrics.best if run.metrics else None
    if best is not None and best.threshold is not None:
        how = "highest micro F1 on all validation rows; scores are cross-fitted in two halves"
        found.insert(2, Fact("Label threshold", format_number(best.threshold), how))
    loss = (run.task or TaskBlock()).training_loss
    if loss != "full":
        how = "over a sample of the vocabulary; validation uses the full loss"
        found.insert(2, Fact("Loss of training steps", loss, how))
    found[:0] = _test(run)
    found.append(Fact("Adapter on disk", format_bytes(sizes.adapter_bytes)))
    if sizes.gradient_bytes_per_step is not None:
        sent = format_bytes(sizes.gradient_bytes_per_step)
        found.append(Fact("Gradients sent per step and process", sent))
    return found


def scale_of_run(run: RunRecord) -> Scale:
    """Return the scale of a run's scores, which names the class if they are of one class."""
    task = run.task or TaskBlock()
    return scale_of(task.metric, task.positive_label)


def _score(run: RunRecord) -> Fact:
    task, metrics = run.task or TaskBlock(), run.metrics or MetricsBlock()
    scale, best = scale_of_run(run), best_so_far(metrics)
    parts = [scale.label]
    baseline = None if task.test_examples else task.baseline  # It is that of the test set.
    for label, value in (
        *([baseline] if baseline else []),
        ("before training", metrics.initial.score if metrics.initial else None),
        ("last", metrics.final.score if metrics.final else None),
    ):
        if value is not None:
            parts.append(f"{label} {format_score(value, scale)}")
    if best:
        steps = run.time and run.time.steps
        parts.append(f"at step {best.step:,}" + (f" of {steps:,}" if steps is not None else ""))
    score = format_score(best.score if best else None, scale)
    return Fact("Best validation score", score, "; ".join(parts))


def _test(run: RunRecord) -> list[Fact]:
    """Return the score on the test sets, which chose nothing; empty without them."""
    task, test = run.task or TaskBlock(), run.metrics.test if run.metrics else None
    if test is None:
        return []
    scale = scale_of_run(run)
    parts = [f"{task.baseline[0]} {format_score(task.baseline[1], scale)}"] if task.baseline else []
    for name, values in test.values.items():
        rows = counted(task.test_examples.get(name, 0), "row")
        parts.append(f"{name} {format_score(values.get(task.metric or ''), scale)} on {rows}")
    detail = "; ".join([*parts, f"loss {format_number(test.loss)}"])
    return [Fact("Test score", format_score(test.score, scale), detail)]


def _loss(run: RunRecord) -> Fact:
    metrics = run.metrics or MetricsBlock()
    if run.task and run.task.kind == "chat":
        return _perplexity(metrics)
    last = metrics.final.loss if metrics.final else None
    detail = f"last {format_number(last)}" if last is not None else ""
    best = best_so_far(metrics)
    return Fact("Validation loss", format_number(best.loss if best else None), detail)


def _perplexity(metrics: MetricsBlock) -> Fact:
    """Return the perplexity of a language model, because its score is the loss."""
    parts = []
    for label, evaluation in (("before training", metrics.initial), ("last", metrics.final)):
        if (value := _first_set(evaluation, "perplexity")) is not None:
            parts.append(f"{label} {format_number(value)}")
    before, best = (
        evaluation.values.get("plain text", {}).get("loss") if evaluation else None
        for evaluation in (metrics.initial, best_so_far(metrics))
    )
    if before is not None and best is not None:
        parts.append(f"loss on plain text {format_number(best)}, {best - before:+.3f} by training")
    best_evaluation = best_so_far(metrics)
    accuracy = _first_set(best_evaluation, "token_accuracy")
    if accuracy is not None:
        parts.append(f"next token predicted {format_share(accuracy)}")
    return Fact(
        "Perplexity", format_number(_first_set(best_evaluation, "perplexity")), "; ".join(parts)
    )


def _first_set(evaluation: Evaluation | None, metric: str) -> float | None:
    """Return a metric on the first validation set."""
    sets = list(evaluation.values.values()) if evaluation else []
    return sets[0].get(metric) if sets else None


def _trainable(run: RunRecord) -> Fact:
    counts = run.counts or CountsBlock()
    parts = [
        f"{label} {format_count(count)}"
        for label, count in (
            ("targets", counts.trainable_targets),
            ("head", counts.trainable_head),
            ("rest", counts.trainable_rest),
        )
        if count is not None
    ]
    if counts.model_parameters and counts.trainable is not None:
        share = format_share(counts.trainable / counts.model_parameters)
        parts.insert(0, f"{share} of the model")
    return Fact("Trainable parameters", format_count(counts.trainable), "; ".join(parts))


def _peak(run: RunRecord) -> Fact:
    memory = run.memory or MemoryBlock()
    label = "Peak memory, training step"
    phases = [(name, memory.phases[name]) for name in TRAIN_STEP if name in memory.phases]
    if not phases:
        return Fact(label, format_bytes(memory.peak_bytes), memory.peak_phase or "")
    name, phase = max(phases, key=lambda item: item[1].peak_bytes)
    parts = [f"in {name}"]
    if "load" in memory.phases:
        beyond = phase.peak_bytes - memory.phases["load"].categories.weights
        parts.append(f"{format_bytes(beyond)} beyond the weights")
    if phase.reserved_bytes is not None:
        parts.append(f"{format_bytes(phase.reserved_bytes)} reserved")
    return Fact(label, format_bytes(phase.peak_bytes), "; ".join(parts))


def _speed(run: RunRecord) -> Fact:
    time = run.time or TimeBlock()
    parts = []
    if time.examples_per_s is not None:
        parts.append(f"{format_number(time.examples_per_s)} examples/s")
    if time.step_median_s is not None:
        iqr = f", IQR {format_seconds(time.step_iqr_s)}" if time.step_iqr_s is not None else ""
        parts.append(f"median step {format_seconds(time.step_median_s)}{iqr}")
    tokens = run.tokens
    if tokens is not None and tokens.padded and tokens.computed is not None:
        computed = format_share(tokens.computed / tokens.padded)
        real = format_share(tokens.real / tokens.padded)
        parts.append(f"{computed} of the batches' tokens computed, {real} real")
    rate = time.steps_per_s
    value = NOT_RECORDED if rate is None else f"{format_number(rate)} steps/s"
    return Fact("Speed", value, "; ".join(parts))


def _calibration(run: RunRecord) -> Fact:
    found = run.calibration
    if found is None:
        seconds = run.time and run.time.calibrate_s
        value = format_seconds(seconds) if seconds else "none"
        return Fact("Calibration", value, "" if seconds else "the method needs no basis")
    parts = ["basis reused from an earlier run"] if found.reused else []
    parts += [f"{format_count(found.steps)} steps"] if found.steps is not None else []
    parts += [f"peak {format_bytes(found.peak_bytes)}"] if found.peak_bytes is not None else []
    return Fact("Calibration", format_seconds(found.seconds), "; ".join(parts))


# --- sections


def _learning(run: RunRecord) -> list[Block | None]:
    scale = scale_of_run(run)

    def learning_curve() -> Drawing | None:
        baseline = run.task.baseline if run.task else None
        return run_charts.learning_curve(run.metrics, baseline, scale)

    return [
        Figure(
            "Validation score",
            learning_curve,
            captions.learning_caption(run, scale),
            captions.learning_alt(run, scale),
            "Scores: not recorded.",
        ),
        Figure(
            "Loss",
            lambda: run_charts.loss_curve(run.metrics),
            captions.loss_caption(run),
            captions.loss_alt(run.metrics),
            "Losses: not recorded.",
        ),
        sets_table(run),
        sources_table(run),
        samples_table(run),
    ]


def _memory(run: RunRecord) -> list[Block]:
    bars = [(name, phase.categories) for name, phase in memory_phases(run)]
    table = memory_table(run) or Paragraph("Memory: not recorded.", dim=True)
    alt = captions.memory_alt([(name, found) for name, found in bars])
    return [
        Figure(
            "Memory at the peak of each phase", lambda: run_charts.memory_bars(bars), _MEMORY, alt
        ),
        table,
    ]


def memory_table(run: RunRecord) -> Table | None:
    """Return the peak of every phase by category in MiB; None if nothing was recorded."""
    phases = memory_phases(run)
    if run.memory is None or not phases:
        return None

    def category(key: str) -> Column[tuple[str, MemoryPhase]]:
        return Column(CATEGORIES[key], lambda row: format_mib(getattr(row[1].categories, key)))

    columns: list[Column[tuple[str, MemoryPhase]]] = [
        Column("phase", lambda row: row[0], words=True),
        *(category(key) for key in CATEGORIES),
        Column("peak", lambda row: format_mib(row[1].peak_bytes)),
        Column("reserved", lambda row: format_mib(row[1].reserved_bytes)),
        # Without decimals, because RSS is coarse and includes other libraries.
        Column("RSS", lambda row: format_mib(row[1].rss_bytes, digits=0)),
    ]
    notes = [f"{run.memory.device or 'device'}: {run.memory.how}"] if run.memory.how else []
    if run.memory.batch_shape:
        shape = " × ".join(map(format_count, run.memory.batch_shape))
        notes.append(f"measured on batches of at most {shape}")
    caption = "Memory at the peak of each phase, MiB"
    return Table.of(phases, columns, caption, notes).without_empty()


def memory_phases(run: RunRecord) -> list[tuple[str, MemoryPhase]]:
    """Return the phases with a recorded peak, in chronological order."""
    there = run.memory.phases if run.memory else {}
    names = [*_PHASES, *sorted(name for name in there if name not in _PHASES)]
    return [(name, there[name]) for name in names if name in there]


def _time(run: RunRecord) -> list[Block]:
    return [
        Figure("Time", lambda: run_charts.time_bar(times(run)), _TIME, time_line(run)),
        Paragraph(time_line(run), dim=True),
    ]


def times(run: RunRecord) -> list[tuple[str, float]]:
    """Return (phase, seconds) of a run, with the remaining time last."""
    clock = run.time or TimeBlock()
    spent = [key for key in _TIMES if key != "calibrate_s" or not _basis_reused(run)]
    found = [(_TIMES[key], seconds) for key in spent if (seconds := getattr(clock, key))]
    if found and clock.total_s is not None:
        rest = clock.total_s - sum(seconds for _, seconds in found)
        if rest > 0.01 * clock.total_s:
            found.append(("everything else", rest))
    return found


def _basis_reused(run: RunRecord) -> bool:
    """Return whether the time of calibration was spent by an earlier run."""
    return run.calibration is not None and bool(run.calibration.reused)


def time_line(run: RunRecord) -> str:
    """Return all of :func:`times` in one line, with the total."""
    parts = [f"{label} {format_seconds(seconds)}" for label, seconds in times(run)]
    if run.time and run.time.total_s is not None:
        parts.append(f"total {format_seconds(run.time.total_s)}")
    if _basis_reused(run) and run.time and run.time.calibrate_s:
        parts.append(f"its basis took {format_seconds(run.time.calibrate_s)} when it was made")
    return " · ".join(parts) or NOT_RECORDED


def _parameters(run: RunRecord) -> list[Block | None]:
    target = f" Target: {run.sparsity.target}." if run.sparsity else ""
    return [
        Figure(
            "Parameters that changed",
            lambda: run_charts.sparsity_map(run.sparsity),
            _TOUCHED + target,
            captions.changed_alt([("", run.sparsity)] if run.sparsity else []),
        ),
        optimizer_table(run),
        targets_table(run),
    ]


def optimizer_table(run: RunRecord) -> Table | None:
    """Return the learning rate and weight decay of every group of parameters."""
    if run.optimizer is None:
        return None
    columns: list[Column[ParameterGroup]] = [
        Column("parameters", lambda g: format_count(g.parameters)),
        Column("learning rate", lambda g: format_number(g.learning_rate)),
        Column("weight decay", lambda g: format_number(g.weight_decay)),
    ]
    caption = f"Optimizer: {words(run.optimizer.name)}, {run.optimizer.type}"
    return Table.of(run.optimizer.groups, columns, caption)


def targets_table(run: RunRecord) -> Table | None:
    """Return the trained parameters of every target module."""
    targets = run.counts.targets if run.counts else []

    def share(target: TargetCounts) -> str:
        size = target.out_features * target.in_features
        return format_share(target.entries / size if size else None)

    columns: list[Column[TargetCounts]] = [
        Column("target", lambda t: t.name, words=True),
        Column("kind", lambda t: t.kind, words=True),
        Column("block", lambda t: words(t.block)),
        Column("out × in", lambda t: f"{t.out_features:,} × {t.in_features:,}"),
        Column("trainable", lambda t: format_count(t.entries)),
        Column("share", share),
    ]
    caption = "Trainable parameters by target"
    return Table.of(targets, columns, caption, folded="Every target") if targets else None


def notes_of(run: RunRecord) -> list[str]:
    """Return the remarks of the task, the counts and the metrics."""
    found = [*run.task.notes] if run.task else []
    found += [run.counts.note] if run.counts else []
    found += run.metrics.notes if run.metrics else []
    return list(dict.fromkeys(note for note in found if note))
