"""Show an evaluation on a file: its scores, the confusion matrix, and what the model gets wrong."""

from __future__ import annotations

from dataclasses import replace

from sparsegrad_cli.records.evaluation import (
    ClassScores,
    EvaluationRecord,
    MetricValue,
    WrongExample,
)
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.report.document import (
    Bullets,
    Column,
    Document,
    Paragraph,
    Section,
    Table,
    Verdict,
)
from sparsegrad_cli.report.headline import evaluation_headline
from sparsegrad_cli.report.next_steps import evaluation_next
from sparsegrad_cli.report.units import (
    counted,
    format_count,
    format_interval,
    format_number,
    format_percent,
    format_score,
)

_SCREEN_TEXT, _PAGE_TEXT = 60, 300  # Characters of a text in a table.
_SCREEN_ROWS = 5


def evaluation_screen(record: EvaluationRecord) -> Document:
    """Return the facts and the first wrong examples, for a terminal."""
    return _document(record, _SCREEN_ROWS, _SCREEN_TEXT)


def evaluation_document(record: EvaluationRecord) -> Document:
    """Return the report of an evaluation."""
    document = _document(record, len(record.worst), _PAGE_TEXT)
    return replace(document, sections=[*document.sections, evaluation_next(record)])


def _document(record: EvaluationRecord, examples: int, length: int) -> Document:
    sections = []
    if record.classes:
        tables = [_class_table(record), *([_confusion(record)] if record.confusion else [])]
        sections.append(Section("By class" if record.confusion else "By label", tables))
    sections.append(Section("Most wrong", [_worst(record, examples, length)]))
    return Document(
        title=record.model,
        status="done",
        subtitle=f"{record.about} on {record.file}",
        lead=[
            Verdict(evaluation_headline(record)),
            _scores(record),
            Bullets(record.notes) if record.notes else None,
        ],
        sections=sections,
    )


def _scores(record: EvaluationRecord) -> Table:
    """Return one row per metric with its interval, then the loss and the number of rows."""

    def interval(name: str, value: MetricValue) -> str:
        scale = scale_of(name)
        return format_interval(scale.clip(value.interval), scale)

    columns: list[Column[tuple[str, MetricValue]]] = [
        Column("metric", lambda row: scale_of(row[0]).label, words=True),
        Column("value", lambda row: format_score(row[1].value, scale_of(row[0]))),
        Column("95 % interval", lambda row: interval(*row)),
    ]
    rows = counted(record.rows, "row")
    notes = [rows if record.loss is None else f"mean loss {format_number(record.loss)} on {rows}"]
    if record.threshold is not None:
        notes.append(
            f"a label is predicted if its probability is at least {format_number(record.threshold)}"
        )
    notes += [f"{counted(record.cut, 'row')} cut to the model's length"] if record.cut else []
    if record.resamples:
        notes.append(f"intervals: {_interval_words(record)}")
    return Table.of(list(record.metrics.items()), columns, "Scores", notes)


def _interval_words(record: EvaluationRecord) -> str:
    """Return how the intervals were computed."""
    shares = [scale_of(n).words for n, m in record.metrics.items() if m.interval_by == "wilson"]
    words = [f"Wilson's for {' and '.join(shares)}"] if shares else []
    if any(m.interval and m.interval_by == "bootstrap" for m in record.metrics.values()):
        resamples = f"{format_count(record.resamples)} resamples"
        words.append(f"a bootstrap over rows, {resamples}{', for the others' if shares else ''}")
    return "; ".join(words) or "none"


def _class_table(record: EvaluationRecord) -> Table:
    columns: list[Column[ClassScores]] = [
        Column("class" if record.confusion else "label", lambda c: c.name, words=True),
        Column("rows", lambda c: format_count(c.rows)),
        Column("predicted", lambda c: format_count(c.predicted)),
        Column(
            "precision",
            lambda c: format_percent(c.precision) if c.predicted else "never predicted",
        ),
        Column("recall", lambda c: format_percent(c.recall)),
        Column("F1", lambda c: format_percent(c.f1)),
    ]
    if not record.confusion:
        columns.append(
            Column("average precision", lambda c: format_percent(c.average_precision)),
        )
    kind = "class" if record.confusion else "label"
    return Table.of(record.classes, columns, f"How well each {kind} is found")


def _confusion(record: EvaluationRecord) -> Table:
    names = [each.name for each in record.classes]
    rows = [
        (name, *(format_count(count) for count in counts))
        for name, counts in zip(names, record.confusion, strict=True)
    ]
    strong = frozenset((at, at + 1) for at in range(len(names)))
    words = (True, *(False for _ in names))
    caption = "Confusion matrix: a row for each label, a column for each prediction"
    return Table(caption, ("label", *names), rows, words, strong)


def _worst(record: EvaluationRecord, count: int, length: int) -> Table | Paragraph:
    kept = record.worst[:count]
    if not kept:
        return Paragraph("No row is wrong." if record.classes else "No row is shown.")
    columns: list[Column[WrongExample]] = [
        Column("place", lambda w: w.place.rpartition("/")[2], words=True),
        Column("label", lambda w: w.label, words=True),
        Column("prediction", lambda w: w.prediction, words=True),
        Column("loss", lambda w: format_number(w.loss)),
        Column("text", lambda w: _shortened(" | ".join(w.texts), length), words=True),
    ]
    rows = "wrong row" if record.classes else "row"
    order = "highest loss" if record.classes else "largest error"
    caption = f"The {rows if len(kept) == 1 else counted(len(kept), rows)} with the {order}"
    return Table.of(kept, columns, caption)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
