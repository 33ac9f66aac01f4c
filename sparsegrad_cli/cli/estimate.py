"""estimate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Device,
    Json,
    Quiet,
    RecipeAndOverrides,
    load,
    refuse_without_effect,
    split_arguments,
)
from sparsegrad_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsegrad_cli.estimate.estimate_steps import Room
    from sparsegrad_cli.estimate.fake_run import Kernels
    from sparsegrad_cli.recipe.load_recipe import LoadedRecipe


def estimate(
    recipe: RecipeAndOverrides = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="full, lora, meprop, sparsegrad; several with commas or by repeating it. They "
            "train as many entries as the recipe's density says. The recipe's own by default.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="Examples; the recipe's by default.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", "-l", min=1, help="Tokens; max_length by default."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="24GiB, say: also find the largest batch that fits there."),
    ] = None,
    overhead: Annotated[
        str | None,
        typer.Option(
            "--overhead",
            help="With --gpu: what a GPU has given away before any tensor; 0.5GiB by default.",
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device",
            help="Whose kernels: cuda with --gpu, else those of what train would use.",
            show_default=False,
        ),
    ] = None,
    no_padding: Annotated[
        bool, typer.Option("--no-padding", help="Rows are of one length: attention has no mask.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Memory of a training step by category, without weights and data.

    The real step runs on tensors that have shapes and no memory; of the model only the
    configuration is needed, which is built in for the paper's models. A study gives a row for
    each of its methods.

    [bold]sparsegrad estimate my_task.yaml --method full,lora,meprop,sparsegrad --gpu 24GiB[/bold]
    [bold]sparsegrad estimate recipes/paper_table_6.yaml --gpu 48GiB[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver
    from sparsegrad_cli.estimate.fake_run import Conditions
    from sparsegrad_cli.report.estimate import estimate_screen
    from sparsegrad_cli.report.terminal import screen

    room = _room(gpu, overhead)
    cells = _cells(recipe, methods or [], batch, length, device)
    conditions = Conditions(
        kernels=_kernels(device, gpu is not None, cells[0][1]), padded=not no_padding
    )
    with QuietObserver() if quiet or as_json else ProgressObserver() as observer:
        from sparsegrad_cli.estimate.estimate_steps import estimate_steps

        record = estimate_steps(cells, conditions, room, observer)
    if as_json:
        typer.echo(json.dumps(record.to_json()))
    else:
        Console().print(screen(estimate_screen(record)))


def _cells(
    recipe: list[str] | None,
    methods: list[str],
    batch: int | None,
    length: int | None,
    device: Device | None,
) -> list[tuple[str, LoadedRecipe]]:
    """Label and recipe of every row: of the recipe, of its methods, or of a study's cells."""
    from sparsegrad_cli.cli.recipes import is_study
    from sparsegrad_cli.recipe.study import load_study, make_study

    arguments = list(recipe or [])
    if batch is not None:
        arguments.append(f"train.per_device_train_batch_size={batch}")
    if length is not None:
        arguments.append(f"task.max_length={length}")
    source, overrides = split_arguments(arguments)
    names = tuple(name.strip() for text in methods for name in text.split(",") if name.strip())
    if source is not None and is_study(source):
        if names:
            raise UsageError(
                "a study names its own methods",
                where=source,
                fix="leave --method out, or estimate the recipe that the study is about",
            )
        study = load_study(source, overrides)
        budget = study.study.budget
        if budget is not None:
            from sparsegrad_cli.study.budget.solve_study import solve_study

            study = solve_study(study, kernels=None if device is None else device.value)
    elif names:
        study = make_study(source, names, 1, overrides, option="--method")
    else:
        loaded = load(arguments, None)
        return [(loaded.recipe.method.name, loaded)]
    first = study.cells[0].seed
    return [(cell.label, cell.loaded) for cell in study.cells if cell.seed == first]


def _room(gpu: str | None, overhead: str | None) -> Room | None:
    from sparsegrad_cli.estimate.estimate_steps import Room

    if gpu is None:
        if overhead is not None:
            why = "it says what of --gpu is taken, which is not given"
            refuse_without_effect("--overhead", why, "--gpu 24GiB, or leave it out")
        return None
    overhead = overhead or "0.5GiB"
    room = Room(_bytes(gpu, "--gpu"), _bytes(overhead, "--overhead"))
    if room.for_tensors <= 0:
        raise UsageError(
            f"--overhead {overhead} leaves nothing of --gpu {gpu}", where="command line"
        )
    return room


def _bytes(text: str, option: str) -> int:
    import re

    from sparsegrad_cli.recipe.section import parse_bytes

    if not re.fullmatch(r"\d+(\.\d+)? ?[KMG]iB", text):
        raise UsageError(
            f"{option} {text!r} is not a size", where="command line", fix="write 24GiB or 512MiB"
        )
    return parse_bytes(text)


def _kernels(device: Device | None, has_gpu: bool, loaded: LoadedRecipe) -> Kernels:
    import torch

    if device is not None:
        return "cpu" if device is Device.cpu else "cuda"
    if has_gpu or (torch.cuda.is_available() and not loaded.recipe.train.use_cpu):
        return "cuda"
    return "cpu"
