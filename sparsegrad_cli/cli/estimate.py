"""``sparsegrad estimate``."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sparsegrad_cli.cli.arguments import (
    Debug,
    Device,
    Json,
    Quiet,
    RecipeAndOverrides,
    is_study_file,
    load,
    refuse_without_effect,
    split_arguments,
    split_names,
)
from sparsegrad_cli.cli.output import show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.section import parse_bytes

if TYPE_CHECKING:
    from sparsegrad_cli.estimate.estimate_steps import Room
    from sparsegrad_cli.estimate.fake_run import Kernels
    from sparsegrad_cli.estimate.fake_shards import Shard
    from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
    from sparsegrad_cli.recipe.study import LoadedStudy


class Sharding(StrEnum):
    """How several processes share a model."""

    ddp = "ddp"
    fsdp2 = "fsdp2"


Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="lora, meprop, sparsegrad, full, or any method that sparsegrad explain lists "
        "(default: the recipe's). Name several with commas or by repeating the option; each "
        "trains as many parameters as the recipe's density selects.",
    ),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", "-b", min=1, help="Examples per batch (default: the recipe's)."),
]
Length = Annotated[
    int | None,
    typer.Option("--length", "-l", min=1, help="Tokens per example (default: max_length)."),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", help="Memory of a GPU, such as 24GiB: also find the largest batch that fits."
    ),
]
Overhead = Annotated[
    str | None,
    typer.Option(
        "--overhead",
        help="With --gpu: memory that is taken before the first tensor (default: 0.5GiB).",
    ),
]
KernelDevice = Annotated[
    Device | None,
    typer.Option(
        "--device",
        help="Device whose kernels are counted (default: cuda with --gpu, else the one that train "
        "would use).",
        show_default=False,
    ),
]
NoPadding = Annotated[
    bool,
    typer.Option(
        "--no-padding", help="All examples have the same length, so attention needs no mask."
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=2,
        help="Number of processes (GPUs), simulated: count the memory of one of them and what it "
        "sends in a step.",
    ),
]
ShardBy = Annotated[
    Sharding | None,
    typer.Option(
        "--shard",
        help="With --processes: ddp, each has all weights (default); fsdp2, they share them.",
        show_default=False,
    ),
]


def estimate(
    recipe: RecipeAndOverrides = None,
    methods: Methods = None,
    batch: Batch = None,
    length: Length = None,
    gpu: Gpu = None,
    overhead: Overhead = None,
    device: KernelDevice = None,
    no_padding: NoPadding = False,
    processes: Processes = None,
    shard: ShardBy = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Estimate the memory of a training step by category, without weights or data.

    A real training step runs on tensors that have shapes but no memory. Only the model's
    configuration is needed; those of the paper's models are built in. A study gives a row for each
    of its methods.

    [bold]sparsegrad estimate my_task.yaml --method full,lora,meprop,sparsegrad --gpu 24GiB[/bold]
    [bold]sparsegrad estimate recipes/paper_table_6.yaml --gpu 48GiB[/bold]
    [bold]sparsegrad estimate my_task.yaml -m lora,sparsegrad --processes 8 --shard fsdp2[/bold]
    """
    from sparsegrad_cli.estimate.estimate_steps import estimate_steps
    from sparsegrad_cli.estimate.fake_run import Conditions
    from sparsegrad_cli.report.estimate import estimate_screen

    if shard is not None and processes is None:
        why = "it says what several processes share"
        refuse_without_effect("--shard", why, "--processes 8, or leave it out")
    room = _room(gpu, overhead)
    arguments = _with_sizes(recipe or [], batch, length)
    rows = _rows(arguments, split_names(methods or []), device)
    kernels = _kernels(device, gpu is not None, rows[0][1])
    with make_observer(quiet or as_json) as observer:
        conditions = Conditions(kernels=kernels, padded=not no_padding)
        if processes is not None:
            how: Shard = (shard or Sharding.ddp).value
            conditions = replace(conditions, processes=processes, shard=how)
        record = estimate_steps(rows, conditions, room, observer)
    show(record.to_json(), estimate_screen(record), as_json=as_json)


def _with_sizes(arguments: list[str], batch: int | None, length: int | None) -> list[str]:
    """Add ``--batch`` and ``--length`` as overrides of the recipe."""
    sizes = {"train.per_device_train_batch_size": batch, "task.max_length": length}
    return [*arguments, *(f"{key}={size}" for key, size in sizes.items() if size is not None)]


def _rows(
    arguments: list[str], methods: tuple[str, ...], device: Device | None
) -> list[tuple[str, LoadedRecipe]]:
    """Return the label and recipe of each row: of the recipe, its methods, or a study's runs."""
    from sparsegrad_cli.recipe.study import make_study

    source, overrides = split_arguments(arguments)
    if source is not None and is_study_file(source):
        if methods:
            raise UsageError(
                "a study names its own methods",
                where=source,
                fix="leave --method out, or estimate the recipe that the study compares them on",
            )
        study = _solved_study(source, overrides, device)
    elif methods:
        study = make_study(source, methods, 1, overrides, option="--method")
    else:
        loaded = load(arguments, None)
        return [(loaded.recipe.method.name, loaded)]
    first = study.cells[0].seed
    return [(cell.label, cell.loaded) for cell in study.cells if cell.seed == first]


def _solved_study(source: str, overrides: tuple[str, ...], device: Device | None) -> LoadedStudy:
    """Load a study at the sizes that its budget allows."""
    from sparsegrad_cli.recipe.study import load_study
    from sparsegrad_cli.study.budget.solve_study import solve_study

    study = load_study(source, overrides)
    if study.study.budget is None:
        return study
    return solve_study(study, kernels=None if device is None else device.value)


def _room(gpu: str | None, overhead: str | None) -> Room | None:
    """Return the memory that ``--gpu`` and ``--overhead`` leave for tensors; None without a GPU."""
    from sparsegrad_cli.estimate.estimate_steps import Room

    if gpu is None:
        if overhead is not None:
            why = "it is subtracted from --gpu, which is not given"
            refuse_without_effect("--overhead", why, "--gpu 24GiB, or leave it out")
        return None
    overhead = overhead or "0.5GiB"
    room = Room(_bytes(gpu, "--gpu"), _bytes(overhead, "--overhead"))
    if room.for_tensors <= 0:
        raise UsageError(
            f"--overhead {overhead} leaves no memory of --gpu {gpu}",
            where="command line",
            fix="give an --overhead below --gpu",
        )
    return room


def _bytes(text: str, option: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        fix = "write 24GiB or 512MiB"
        raise UsageError(f"{option} {error}", where="command line", fix=fix) from None


def _kernels(device: Device | None, has_gpu: bool, loaded: LoadedRecipe) -> Kernels:
    from sparsegrad_cli.estimate.fake_run import kernels_of_training

    if device is not None:
        return device.value
    return "cuda" if has_gpu else kernels_of_training(loaded.recipe)
