"""``sparsegrad predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import expanded, is_file
from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.progress import Observer

if TYPE_CHECKING:
    from sparsegrad_cli.predict.classifier import Classifier
    from sparsegrad_cli.predict.predict_rows import Summary
    from sparsegrad_cli.predict.row_stream import Row

_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Folder of a run, of a comparison (its best run) or of an export (merged or adapter).",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TEXT]... | FILE | -",
        help="Texts, or one CSV, TSV, JSON lines or Parquet file, or - for one text a line on "
        "standard input. A model of pairs takes texts two at a time. KEY=VALUE names paths that "
        "have changed since the run, such as model.name=FOLDER.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File for the rows with their predictions (.csv, .tsv, .jsonl or .parquet); standard "
        "output by default.",
    ),
]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", help="Column of the text (default: as in training).")
]
PairColumn = Annotated[
    str | None, typer.Option("--text-pair-column", help="Column of the second text.")
]
AllProbabilities = Annotated[
    bool, typer.Option("--probabilities", "-p", help="Add the probability of every class.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a batch.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Tokens of a text (default: as in training)."),
]


def predict(
    run: Source,
    inputs: Inputs = None,
    output: Output = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    all_probabilities: AllProbabilities = False,
    batch_size: BatchSize = 64,
    max_length: MaxLength = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Label texts, or the rows of a file, with a trained classifier.

    All columns of a file are kept; prediction and probability are added.

    [bold]sparsegrad predict runs/reviews "a fine film" "dull"[/bold]
    [bold]sparsegrad predict runs/reviews new.csv -o labelled.csv[/bold]
    """
    given = list(inputs or ())
    overrides = tuple(text for text in given if _is_override(text))
    given = [text for text in given if text not in overrides]
    file = _file_of(given)
    if file is None and (output or text_column or text_pair_column):
        option = "--output" if output else "--text-column"
        raise UsageError(f"{option} has no effect without a FILE", where="command line")
    if file is not None and as_json:
        raise UsageError(
            "--json is for texts, and the input is a file",
            where="command line",
            fix="--output FILE.jsonl",
        )
    if not given:
        raise UsageError(
            "expected texts or a file to label, got none",
            where="command line",
            fix="texts, a file, or -",
        )
    if output is not None:
        from sparsegrad_cli.predict.output import check_format

        check_format(output)
    with make_observer(quiet or as_json) as observer:
        from sparsegrad_cli.predict.classifier import load_trained_classifier

        observer.phase("load", run)
        classifier = load_trained_classifier(run, overrides, max_length=max_length)
        if classifier.about != run:
            observer.note(classifier.about)
        if file is not None:
            columns = (text_column, text_pair_column)
            summary = _label_file(
                classifier,
                file,
                output,
                columns,
                observer,
                batch_size=batch_size,
                all_probabilities=all_probabilities,
            )
        else:
            observer.close()  # The labels go to standard output, which may be the same terminal.
            summary = _label_texts(
                classifier,
                given,
                batch_size=batch_size,
                all_probabilities=all_probabilities,
                as_json=as_json,
            )
    if not quiet and (file is not None or summary.cut):
        Console(stderr=True, highlight=False).print(_sentence(summary, output), markup=False)


def _is_override(text: str) -> bool:
    """Return whether an argument names a path that has moved: ``model.name=FOLDER``."""
    key = text.partition("=")[0]
    return "=" in text and key in ("model.name", "model.trust_remote_code", "train.use_cpu")


def _file_of(given: list[str]) -> Path | None:
    """Return the file that the arguments name; None for texts.

    Raises:
        UsageError: There is no such file, or there is more than one argument beside it.
    """
    files = [text for text in given if is_file(expanded(text))]
    missing = [text for text in given if text.lower().endswith(_SUFFIXES) and text not in files]
    if missing and " " not in missing[0]:
        raise UsageError(f"the file {missing[0]} does not exist", where="command line")
    if files and len(given) > 1:
        raise UsageError(
            f"expected one file or texts, got {len(given)} arguments, among them {files[0]}",
            where="command line",
            fix="label one file at a time",
        )
    return expanded(files[0]) if files else None


def _label_file(
    classifier: Classifier,
    file: Path,
    output: Path | None,
    columns: tuple[str | None, str | None],
    observer: Observer,
    *,
    batch_size: int,
    all_probabilities: bool,
) -> Summary:
    from sparsegrad_cli.predict.output import open_output, text_writer
    from sparsegrad_cli.predict.predict_rows import (
        CHUNK,
        Summary,
        added_columns,
        label_rows,
        text_columns,
    )
    from sparsegrad_cli.predict.row_stream import open_rows

    stream, summary = open_rows(file), Summary()
    added = added_columns(classifier, all_probabilities=all_probabilities)
    taken = [name for name in added if name in stream.names]
    if taken:
        raise UsageError(
            f"{file} already has a column {taken[0]!r}", where=str(file), fix="rename that column"
        )
    observer.phase("predict", str(file))
    observer.total_steps("predict", None, unit="rows")
    labelled = label_rows(
        classifier,
        stream.chunks(CHUNK),
        text_columns(stream.names, classifier, *columns),
        batch_size=batch_size,
        all_probabilities=all_probabilities,
        summary=summary,
    )
    if output is None:
        if sys.stdout.isatty():
            observer.close()
        suffix = ".jsonl" if stream.format == ".parquet" else stream.format
        writer = text_writer(sys.stdout, suffix, stream, added)
        for rows, more in labelled:
            writer.write(rows, more)
            observer.step("predict", {"step": summary.rows})
        return summary
    with open_output(output, stream, added) as writer:
        for rows, more in labelled:
            writer.write(rows, more)
            observer.step("predict", {"step": summary.rows})
    return summary


def _label_texts(
    classifier: Classifier,
    given: list[str],
    *,
    batch_size: int,
    all_probabilities: bool,
    as_json: bool,
) -> Summary:
    from sparsegrad_cli.predict.predict_rows import Summary, label_rows

    columns = list(classifier.text_columns) or ["text"]
    summary = Summary()
    for rows, more in label_rows(
        classifier,
        _chunks(given, columns),
        columns,
        batch_size=batch_size,
        all_probabilities=all_probabilities or as_json,
        summary=summary,
    ):
        for row, added in zip(rows, more, strict=True):
            values = {**row.values, **added}
            typer.echo(
                json.dumps(values, ensure_ascii=False) if as_json else _line(values, columns)
            )
    return summary


def _chunks(given: list[str], columns: list[str]) -> Iterator[list[Row]]:
    """Yield the texts of the command line, or the lines of standard input as they come."""
    from sparsegrad_cli.predict.row_stream import Row

    if given == ["-"]:
        for number, line in enumerate(sys.stdin, start=1):
            texts = line.rstrip("\r\n").split("\t") if len(columns) > 1 else [line.rstrip("\r\n")]
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


def _line(values: dict[str, Any], columns: list[str]) -> str:
    """Return ``label  probability  text`` of one row."""
    prediction = values["prediction"]
    label = prediction if isinstance(prediction, str) else f"{prediction:.4f}"
    parts = [printable_line(label)]
    if "probability" in values:
        parts.append(f"{values['probability']:.3f}")
    classes = [n for n in values if n.startswith("probability_")]
    parts += [f"{n.removeprefix('probability_')} {values[n]:.3f}" for n in classes]
    return "\t".join([*parts, *(printable_line(values[column]) for column in columns)])


def _sentence(summary: Summary, output: Path | None) -> str:
    """Return such as ``1,000 rows labelled (positive 612, negative 388), written to out.csv.``."""
    counts = ", ".join(
        f"{printable_line(name)} {count:,}" for name, count in summary.labels.most_common(10)
    )
    if not counts and summary.rows:
        counts = f"scores from {summary.lowest:.4g} to {summary.highest:.4g}"
    text = f"{summary.rows:,} row{'s' if summary.rows != 1 else ''} labelled ({counts})"
    if output is not None:
        text += f", written to {output}"
    text += "."
    if summary.cut:
        text += f" {summary.cut:,} were longer than the model reads and were cut."
    return text
