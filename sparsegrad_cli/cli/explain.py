"""``sparsegrad explain`` and ``env``."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsegrad_cli.cli.arguments import Debug, Json
from sparsegrad_cli.recipe.explain_key import Key, explain_key, methods, sections
from sparsegrad_cli.records.environment import PACKAGES, cpu_model, package_versions

_OPTIONAL = (
    "bitsandbytes",
    "trl",
    "optuna",
    "submitit",
    "ray",
    "deepspeed",
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
)
# Variables that change what a run does or where it looks; values of others may be secret.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "SLURM_JOB_ID",
    "WORLD_SIZE",
)


def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A key such as train.learning_rate or density, a section such as train, or a "
            "method such as lora (default: all sections and methods).",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a key of a recipe or a study, or a method: meaning, type and default.

    [bold]sparsegrad explain train.warmup_steps[/bold]
    [bold]sparsegrad explain lora[/bold]
    """
    console = Console(highlight=False)
    if key is None:
        found = [*sections(), *methods()]
        if as_json:
            typer.echo(json.dumps([asdict(each) for each in found]))
            return
        console.print(_overview(sections(), "section"))
        console.print(_overview(methods(), "method"))
        console.print(
            "PEFT's types and the variants of LoRA are methods, too: dora, vera, shira and so on."
        )
        return
    found = explain_key(key)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    for number, each in enumerate(found):
        if number:
            console.print()
        console.print(_block(each))


def _overview(keys: list[Key], what: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column(what, no_wrap=True)
    table.add_column("meaning")
    for key in keys:
        table.add_row(Text(key.path.removeprefix("method.name: ")), Text(key.meaning))
    return table


def _block(key: Key) -> Table:
    name = Text(key.path, style="bold")
    if key.owner == "study":
        name.append("  (of a study)", style="dim")
    table = Table(box=None, pad_edge=False, show_header=False, title=name, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in (
        ("  meaning", key.meaning),
        ("  type", key.type),
        ("  default", key.default),
        ("  methods", "" if key.owner == "study" else key.owner),
        ("  keys", ", ".join(key.inner)),
    ):
        if value:
            table.add_row(label, Text(value))
    return table


def env(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices and folders: what a bug report needs."""
    found = _environment()
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in found.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        shown = [f"{key} {text}".strip() for key, text in inner if text is not None]
        table.add_row(Text(name), Text("\n".join(shown) or "none"))
    Console(highlight=False).print(table)


def _environment() -> dict[str, Any]:
    import psutil
    import torch
    from huggingface_hub import constants

    threads = torch.get_num_threads()
    gpus = {
        f"cuda:{number}": f"{torch.cuda.get_device_name(number)}, "
        f"{torch.cuda.get_device_properties(number).total_memory / 2**30:.1f} GiB"
        for number in range(torch.cuda.device_count())
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpus": gpus or "none",
        "cuda": torch.version.cuda,
        "packages": package_versions(PACKAGES),
        "optional": {k: v for k, v in package_versions(_OPTIONAL).items() if v is not None},
        "hub cache": str(constants.HF_HUB_CACHE),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
