"""``sparsegrad export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, MovedPaths, Quiet
from sparsegrad_cli.cli.output import show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError


class Form(StrEnum):
    """The forms that a run can be exported to."""

    merged = "merged"
    lora = "lora"
    adapter = "adapter"


Run = Annotated[Path, typer.Argument(help="The folder of a training run.", show_default=False)]
To = Annotated[
    Form,
    typer.Option(
        "--to",
        help="merged: a Hugging Face model; lora: a PEFT adapter; adapter: values, positions "
        "and bases for sparsegrad_cli.load_adapter.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Output folder (default: RUN/export-<to>)."),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", "-r", min=1, help="lora: truncate the change to this rank, and report the error."
    ),
]
ServerRank = Annotated[
    bool,
    typer.Option(
        "--server-rank",
        help="lora: pad with zeros to a rank that servers support (vLLM: 1, 8, 16, 32, 64, 128, "
        "256, 320, 512), and truncate the change above 512. --rank applies first.",
    ),
]
CheckExamples = Annotated[
    int, typer.Option("--check-examples", min=1, help="Number of validation rows to compare.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        min=0.0,
        help="Largest difference of logits (default: what rounding can cause).",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier export in the output folder, and in the repository on the hub.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload the export to a private repository on the Hugging Face Hub. The files are "
        "listed first; data and paths of this machine are not uploaded.",
        show_default=False,
    ),
]
Public = Annotated[
    bool, typer.Option("--public", help="With --push-to-hub: everyone may see the repository.")
]


def export(
    run: Run,
    to: To,
    overrides: MovedPaths = None,
    output_dir: OutputDir = None,
    rank: Rank = None,
    server_rank: ServerRank = False,
    check_examples: CheckExamples = 32,
    tolerance: Tolerance = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a trained model in a form for other programs, and check that it computes the same.

    The written files are loaded with transformers or PEFT alone. If their logits differ from the
    run's, the files are removed and the exit code is 1.

    [bold]sparsegrad export runs/reviews --to merged[/bold]
    [bold]sparsegrad export runs/reviews --to lora --rank 16[/bold]
    [bold]sparsegrad export runs/chat --to lora --server-rank[/bold]
    [bold]sparsegrad export runs/reviews --to merged --push-to-hub me/reviews[/bold]
    """
    from sparsegrad_cli.export.export_run import export_run
    from sparsegrad_cli.export.forms import ExportOptions
    from sparsegrad_cli.export.hub_upload import HubTarget
    from sparsegrad_cli.report.export import export_screen

    if public and push_to_hub is None:
        raise UsageError(
            "--public needs --push-to-hub", where="command line", fix="--push-to-hub OWNER/NAME"
        )
    hub = None if push_to_hub is None else HubTarget(push_to_hub, public, overwrite)
    options = ExportOptions(
        to=to.value,
        output_dir=output_dir,
        rank=rank,
        examples=check_examples,
        tolerance=tolerance,
        overwrite=overwrite,
        server_rank=server_rank,
        hub=hub,
    )
    with make_observer(quiet or as_json) as observer:
        record = export_run(run, options, observer, overrides=tuple(overrides or ()))
    footer = f"Export: {record.output_dir}"
    show(record.to_json(), export_screen(record), as_json=as_json, footer=footer)
