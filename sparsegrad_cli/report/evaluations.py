"""Tables of a run's training mixture, its validation sets and its sample answers."""

from __future__ import annotations

from sparsegrad_cli.records.metric_direction import scale_of, set_metric
from sparsegrad_cli.records.run import (
    Evaluation,
    MetricsBlock,
    MixedSource,
    RunRecord,
    SampleAnswer,
    TaskBlock,
)
from sparsegrad_cli.report.document import Column, Table
from sparsegrad_cli.report.units import format_count, format_number, format_score, format_share

_MOST_STEPS = 12  # Evaluations whose answers are shown: the first one and the last ones.


def sets_table(run: RunRecord) -> Table | None:
    """Return every metric of every validation set; None for a single set."""
    metrics, task = run.metrics or MetricsBlock(), run.task or TaskBlock()
    best = metrics.best.values if metrics.best else {}
    if len(best) < 2:
        return None
    rows = [(name, metric) for name, values in best.items() for metric in values]

    def value(evaluation: Evaluation | None, row: tuple[str, str]) -> str:
        found = evaluation.values.get(row[0], {}).get(row[1]) if evaluation else None
        return format_score(found, scale_of(row[1]))

    columns: list[Column[tuple[str, str]]] = [
        Column("metric", lambda row: set_metric(*row), words=True),
        Column("rows", lambda row: format_count(task.validation_examples.get(row[0]))),
        Column("before training", lambda row: value(metrics.initial, row)),
        Column("kept model", lambda row: value(metrics.best, row)),
        Column("last step", lambda row: value(metrics.final, row)),
    ]
    selected = task.metric_set or next(iter(best))
    notes = [f"{set_metric(selected, task.metric or 'score')} selects the model that is kept"]
    return Table.of(rows, columns, "Validation sets", notes)


def sources_table(run: RunRecord) -> Table | None:
    """Return the sources of a training mixture; None without one."""
    sources = run.task.sources if run.task else []
    taken = sum(source.taken for source in sources) or 1
    columns: list[Column[MixedSource]] = [
        Column("source", lambda source: source.name, words=True),
        Column("weight", lambda source: format_number(source.weight)),
        Column("rows", lambda source: format_count(source.rows)),
        Column("taken", lambda source: format_count(source.taken)),
        Column("share", lambda source: format_share(source.taken / taken)),
    ]
    notes = ["taken counts the rows of an epoch; a repeated row counts each time"]
    return Table.of(sources, columns, "Sources of the training data", notes) if sources else None


def samples_table(run: RunRecord) -> Table | None:
    """Return the answers to the sample prompts by step; None if there were no prompts."""
    history = [e for e in (run.metrics.history if run.metrics else []) if e.samples]
    if not history:
        return None
    shown = history if len(history) <= _MOST_STEPS else [history[0], *history[1 - _MOST_STEPS :]]
    notes = []
    if len(shown) < len(history):
        left_out = len(history) - len(shown)
        notes.append(f"steps.jsonl holds the answers of {left_out} more evaluations")
    rows = [
        (evaluation, number)
        for number in range(len(history[0].samples))
        for evaluation in shown
        if number < len(evaluation.samples)
    ]

    def sample(row: tuple[Evaluation, int]) -> SampleAnswer:
        return row[0].samples[row[1]]

    def answer(row: tuple[Evaluation, int]) -> str:
        found = sample(row)
        return found.answer if found.stopped == "end" else f"{found.answer} …"

    columns: list[Column[tuple[Evaluation, int]]] = [
        Column("prompt", lambda row: sample(row).prompt, words=True),
        Column("step", lambda row: f"{row[0].step}"),
        Column("answer", answer, words=True),
    ]
    notes.append("… marks an answer that ended at the largest number of tokens, not by itself")
    return Table.of(rows, columns, "Answers to the sample prompts by step", notes)
