"""What ``sparsegrad predict`` does with texts, files and GLUE's test splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sparsegrad_cli.data.text_files import decoded_lines
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.untrusted_text import printable_line, printable_text
from sparsegrad_cli.progress import Observer

if TYPE_CHECKING:
    from sparsegrad_cli.predict.classifier import Classifier
    from sparsegrad_cli.predict.predict_rows import Summary
    from sparsegrad_cli.predict.row_stream import Row, RowStream
    from sparsegrad_cli.predict.source import Source

_SUBMISSION, _ANSWER_TOKENS = Path("glue-submission"), 512  # Defaults.


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is predicted.

    Attributes:
        run: the model as the user named it.
        overrides: paths that have changed since the run.
        given: texts of the command line.
        file: rows of a file; None for texts.
        output: file for the rows, or folder of a submission; None for the default.
        columns: of the first and the second text, where the user names them.
        glue: whether to write the files of a submission.
        batch_size: rows of a batch.
        all_probabilities: whether to add the probability of every class.
        max_length: tokens of a text; None as in training.
        max_new_tokens: tokens of an answer; None for the default.
        as_json: whether to print JSON lines.
        observer: shows progress.
    """

    run: str
    overrides: tuple[str, ...]
    given: list[str]
    file: Path | None
    output: Path | None
    columns: tuple[str | None, str | None]
    glue: bool
    batch_size: int
    all_probabilities: bool
    max_length: int | None
    max_new_tokens: int | None
    as_json: bool
    observer: Observer


def label(job: Job) -> Summary | None:
    """Label texts or the rows of a file; None after a submission, which says itself what it wrote.

    Raises:
        SparsegradError: the model cannot be loaded, or the rows cannot be used.
    """
    from sparsegrad_cli.predict.classifier import load_trained_classifier

    job.observer.phase("load", job.run)
    classifier = load_trained_classifier(job.run, job.overrides, max_length=job.max_length)
    if classifier.about != job.run:
        job.observer.note(classifier.about)
    if job.glue:
        _submit(classifier, job)
        return None
    if job.file is not None:
        return _label_file(classifier, job)
    job.observer.close()  # The labels go to standard output, which may be the same terminal.
    return _label_texts(classifier, job)


def answer(job: Job, source: Source) -> Summary:
    """Let a chat model answer every row of a file, or every text.

    Raises:
        SparsegradError: the model cannot be loaded, or the rows cannot be used.
    """
    from sparsegrad_cli.generate.load_chat_model import load_answerer
    from sparsegrad_cli.generate.options import ModelOptions
    from sparsegrad_cli.predict.answer_rows import ADDED, answer_rows, question_column
    from sparsegrad_cli.predict.predict_rows import Summary
    from sparsegrad_cli.predict.row_stream import open_rows
    from sparsegrad_cli.tasks.generation_settings import GenerationSettings

    if source.note:
        job.observer.note(source.note)
    settings = GenerationSettings(max_new_tokens=job.max_new_tokens or _ANSWER_TOKENS)
    options, summary = ModelOptions(source.name, job.overrides), Summary()
    stream = None if job.file is None else open_rows(job.file)
    column = "text" if stream is None else question_column(stream.names, job.columns[0])
    answerer, _ = load_answerer(options, settings, job.observer)
    if stream is not None:
        batches = stream.chunks(job.batch_size)
        _write(job, stream, answer_rows(answerer, batches, column, summary), ADDED, summary)
        return summary
    job.observer.close()  # The answers go to standard output, which may be the same terminal.
    for chunk in _chunks(job.given, [column]):
        starts = range(0, len(chunk), job.batch_size)
        parts = [chunk[at : at + job.batch_size] for at in starts]
        for rows, more in answer_rows(answerer, parts, column, summary):
            for row, added in zip(rows, more, strict=True):
                values = {**row.values, **added}
                shown = printable_text(values["prediction"])
                typer.echo(json.dumps(values, ensure_ascii=False) if job.as_json else shown)
    return summary


def _submit(classifier: Classifier, job: Job) -> None:
    """Write the files of a submission, and say which."""
    from sparsegrad_cli.predict.glue_submission import write_submission

    job.observer.phase("predict", "GLUE's test split")
    folder = job.output or _SUBMISSION
    written, notes = write_submission(
        classifier, folder, batch_size=job.batch_size, observer=job.observer
    )
    for note in notes:
        job.observer.note(note)
    for path, rows in written.items():
        typer.echo(f"{rows:,} rows written to {printable_line(str(path))}.")


def _label_file(classifier: Classifier, job: Job) -> Summary:
    from sparsegrad_cli.predict.predict_rows import (
        CHUNK,
        Summary,
        added_columns,
        label_rows,
        text_columns,
    )
    from sparsegrad_cli.predict.row_stream import open_rows

    assert job.file is not None
    stream, summary = open_rows(job.file), Summary()
    added = added_columns(classifier, all_probabilities=job.all_probabilities)
    columns = text_columns(stream.names, classifier, *job.columns)
    labelled = label_rows(
        classifier,
        stream.chunks(CHUNK),
        columns,
        batch_size=job.batch_size,
        all_probabilities=job.all_probabilities,
        summary=summary,
        observer=job.observer,
    )
    _write(job, stream, labelled, added, summary)
    return summary


def _write(
    job: Job,
    stream: RowStream,
    predicted: Iterator[tuple[list[Row], list[dict[str, Any]]]],
    added: Sequence[str],
    summary: Summary,
) -> None:
    """Write rows with the columns that were added to them, and show how many are done."""
    from sparsegrad_cli.predict.output import open_output, text_writer
    from sparsegrad_cli.predict.row_stream import count_rows

    taken = [name for name in added if name in stream.names]
    if taken:
        raise UsageError(
            f"{job.file} already has a column {taken[0]!r}",
            where=str(job.file),
            fix="rename that column",
        )
    job.observer.phase("predict", str(job.file))
    job.observer.total_steps("predict", count_rows(stream.path), unit="rows")
    if job.output is None:
        if sys.stdout.isatty():
            job.observer.close()  # The rows go to the same terminal.
        suffix = ".jsonl" if stream.format == ".parquet" else stream.format
        writer = text_writer(sys.stdout, suffix, stream, added)
        for rows, more in predicted:
            writer.write(rows, more)
            job.observer.step("predict", {"step": summary.rows})
        return
    with open_output(job.output, stream, added) as writer:
        for rows, more in predicted:
            writer.write(rows, more)
            job.observer.step("predict", {"step": summary.rows})


def _label_texts(classifier: Classifier, job: Job) -> Summary:
    from sparsegrad_cli.predict.predict_rows import Summary, label_rows

    columns = list(classifier.text_columns) or ["text"]
    summary = Summary()
    for rows, more in label_rows(
        classifier,
        _chunks(job.given, columns),
        columns,
        batch_size=job.batch_size,
        all_probabilities=job.all_probabilities or job.as_json,
        summary=summary,
        observer=job.observer,
    ):
        for row, added in zip(rows, more, strict=True):
            values = {**row.values, **added}
            typer.echo(
                json.dumps(values, ensure_ascii=False) if job.as_json else _line(values, columns)
            )
    return summary


def _chunks(given: list[str], columns: list[str]) -> Iterator[list[Row]]:
    """Yield the texts of the command line, or the lines of standard input as they come."""
    from sparsegrad_cli.predict.row_stream import Row

    if given == ["-"]:
        for number, line in _without_blank_end(decoded_lines(sys.stdin.buffer, "standard input")):
            texts = line.split("\t") if len(columns) > 1 else [line]
            if len(texts) != len(columns):
                raise UsageError(
                    f"line {number}: expected two texts with a tab between them, got {len(texts)}",
                    where="standard input",
                )
            yield [Row(f"standard input:{number}", dict(zip(columns, texts, strict=True)))]
        return
    if len(given) % len(columns):
        raise UsageError(
            f"the model reads pairs of texts, got {len(given)} texts",
            where="command line",
            fix="give the texts two at a time",
        )
    starts = range(0, len(given), len(columns))
    texts_of = [given[start : start + len(columns)] for start in starts]
    yield [
        Row(f"text {number}", dict(zip(columns, texts, strict=True)))
        for number, texts in enumerate(texts_of, start=1)
    ]


def _without_blank_end(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield numbered lines. Blank ones wait for a line with text: at the end they are no texts."""
    blank = []
    for number, line in lines:
        blank.append((number, line))
        if line.strip():
            yield from blank
            blank.clear()


def _line(values: dict[str, Any], columns: list[str]) -> str:
    """Return ``label  probability  text`` of one row."""
    prediction, probability = values["prediction"], values.get("probability")
    if isinstance(prediction, list):
        parts = [printable_line(", ".join(prediction)) or "-"]
        parts.append(", ".join(f"{each:.3f}" for each in probability or []) or "-")
    elif isinstance(prediction, str):
        parts = [printable_line(prediction), f"{probability:.3f}"]
    else:
        parts = [f"{prediction:.4f}"]
    classes = [n for n in values if n.startswith("probability_")]
    parts += [f"{n.removeprefix('probability_')} {values[n]:.3f}" for n in classes]
    return "\t".join([*parts, *(printable_line(values[column]) for column in columns)])
