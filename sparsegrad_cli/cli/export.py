"""export."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet


class Form(StrEnum):
    """What a run can be exported to."""

    merged = "merged"
    lora = "lora"
    adapter = "adapter"


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.", show_default=False)],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="merged: a Hugging Face model; lora: a PEFT adapter; adapter: values, positions "
            "and bases for sparsegrad_cli.load_adapter.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="What lies elsewhere now: model.name=FOLDER, task.path=PATH.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="RUN/export-<to> by default.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", "-r", min=1, help="lora: cut the change to this rank; the error is stated."
        ),
    ] = None,
    server_rank: Annotated[
        bool,
        typer.Option(
            "--server-rank",
            help="lora: pad with zeros to a rank that servers take (vLLM: 1, 8, 16, 32, 64, 128, "
            "256, 320, 512); above 512 the change is cut to that. With --rank, after that cut.",
        ),
    ] = False,
    check_examples: Annotated[
        int, typer.Option("--check-examples", min=1, help="Validation rows to compare logits on.")
    ] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Largest difference of logits; by default what rounding explains.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in output-dir.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a trained model in a form that runs elsewhere, and check that it answers alike.

    What was written is loaded back by transformers or peft alone; if its logits differ from the
    run's, nothing is left and the exit code is 1.

    [bold]sparsegrad export runs/reviews --to merged[/bold]
    [bold]sparsegrad export runs/reviews --to lora --rank 16[/bold]
    [bold]sparsegrad export runs/chat --to lora --server-rank[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver
    from sparsegrad_cli.export.options import ExportOptions
    from sparsegrad_cli.io.atomic import without_nan
    from sparsegrad_cli.records.export import ExportRecord
    from sparsegrad_cli.report.export import export_screen
    from sparsegrad_cli.report.terminal import plain_line, screen

    options = ExportOptions(
        to.value, output_dir, rank, check_examples, tolerance, overwrite, server_rank
    )
    with QuietObserver() if quiet or as_json else ProgressObserver() as observer:
        from sparsegrad_cli.export.export_run import export_run

        record = export_run(run, options, observer, overrides=tuple(overrides or ()))
    if as_json:
        typer.echo(json.dumps(record))
        return
    console = Console()
    console.print(screen(export_screen(ExportRecord.model_validate(without_nan(record)))))
    console.print(plain_line(f"Export: {record['output_dir']}"))
