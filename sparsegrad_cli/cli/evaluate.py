"""``sparsegrad evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Json,
    MaxLength,
    MovedPaths,
    PairColumn,
    Quiet,
    TextColumn,
    TrainedModel,
)
from sparsegrad_cli.cli.output import show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import expanded, is_file, is_folder

File = Annotated[
    Path,
    typer.Argument(
        help="CSV, TSV, JSON lines or Parquet file of texts with labels.", show_default=False
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option(
        "--output-dir", "-o", help="Folder for evaluation.json and the report (default: none)."
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--label-column", help="Column of the label (default: as in training)."),
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        "--label-separator",
        help="Text between several labels in a cell (default: as in training, else a list).",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a batch.")]
Worst = Annotated[int, typer.Option("--worst", min=0, help="Number of wrong examples to keep.")]
Resamples = Annotated[
    int, typer.Option("--resamples", min=0, help="Of the bootstrap; 0 gives no intervals at all.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed of the bootstrap.")]


def evaluate(
    run: TrainedModel,
    file: File,
    overrides: MovedPaths = None,
    output_dir: OutputDir = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    label_separator: LabelSeparator = None,
    worst: Worst = 20,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    max_length: MaxLength = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a trained classifier on a file of texts with labels.

    Shows all metrics with 95 % intervals, the confusion matrix (of several labels a row, a
    table of the labels), and the most wrong examples.

    [bold]sparsegrad evaluate runs/reviews test.csv -o reports/test[/bold]
    """
    from sparsegrad_cli.predict.classifier import load_trained_classifier
    from sparsegrad_cli.predict.evaluate_file import EvaluateOptions, evaluate_file
    from sparsegrad_cli.report.evaluation import evaluation_screen

    source = expanded(str(file))
    if is_folder(source):
        raise UsageError(
            f"expected a file of texts with labels, got the folder {file}",
            where="command line",
            fix="name a CSV, TSV, JSON or Parquet file",
        )
    if not is_file(source):
        raise UsageError(f"the file {file} does not exist", where="command line")
    options = EvaluateOptions(
        file=source,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        label_separator=label_separator,
        batch_size=batch_size,
        resamples=resamples,
        seed=seed,
        worst=worst,
    )
    with make_observer(quiet or as_json) as observer:
        observer.phase("load", run)
        classifier = load_trained_classifier(run, tuple(overrides or ()), max_length=max_length)
        observer.phase("evaluate", str(source))
        record = evaluate_file(classifier, options, run, observer)
    footer = None
    if output_dir is not None:
        from sparsegrad_cli.records.store import EVALUATION, write
        from sparsegrad_cli.report.evaluation import evaluation_document
        from sparsegrad_cli.report.render import write_reports

        record = record.changed(output_dir=str(output_dir))
        output_dir.mkdir(parents=True, exist_ok=True)
        write(record, output_dir / EVALUATION)
        write_reports(output_dir, evaluation_document(record))
        footer = f"Report: {output_dir / 'report.html'}"
    show(record.to_json(), evaluation_screen(record), as_json=as_json, footer=footer)
