"""``sparsegrad init``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsegrad_cli.cli.arguments import Debug, Json
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import exists, expanded
from sparsegrad_cli.io.suggest import separable
from sparsegrad_cli.io.untrusted_text import printable_line

if TYPE_CHECKING:
    from sparsegrad_cli.starter.columns import ColumnFacts
    from sparsegrad_cli.starter.inspect_data import FoundData
    from sparsegrad_cli.starter.write_recipe import Starter

_EXAMPLE, _CLASSES = 40, 10  # Characters of a value, and classes, on the screen.

Data = Annotated[
    Path,
    typer.Argument(
        help="A CSV, TSV, JSON, JSON lines or Parquet file, or a folder with train and validation "
        "files: texts with labels, or conversations.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File of the recipe (default: DATA's name and .yaml)."),
]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="Column of the text.")]
PairColumn = Annotated[
    str | None, typer.Option("--text-pair-column", help="Column of a second text.")
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column of the label.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hub id or folder (default: a small model of the package)."),
]
Yes = Annotated[
    bool,
    typer.Option("--yes", "-y", help="Ask nothing: take the likeliest column, with a note."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it is there.")]


def init(
    data: Data,
    output: Output = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    model: Model = None,
    yes: Yes = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at your data, and write a first recipe for it.

    [bold]sparsegrad init reviews.csv[/bold]
    [bold]sparsegrad init data/ --label-column stars --yes[/bold]
    """
    source = expanded(str(data))
    if not exists(source):
        raise UsageError(f"the file or folder {data} does not exist", where="command line")
    target = output or Path(f"{source.resolve().name.partition('.')[0] or 'recipe'}.yaml")
    if exists(target) and not overwrite:
        raise UsageError(
            f"{target} exists already", where="command line", fix="--output NAME, or --overwrite"
        )
    from sparsegrad_cli.io.atomic import write_text_atomic
    from sparsegrad_cli.starter.inspect_data import Choices, inspect_data
    from sparsegrad_cli.starter.write_recipe import plan_recipe, recipe_text

    asks = sys.stdin.isatty() and not yes and not as_json
    choices = Choices(text_column, text_pair_column, label_column)
    found = inspect_data(source, choices, _ask if asks else None)
    plan = plan_recipe(found, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(target, recipe_text(found, plan, target.parent))
    if as_json:
        typer.echo(json.dumps({**_summary(found), **asdict(plan), "recipe": str(target)}))
        return
    _show(found, plan, target)


def _ask(what: str, candidates: Sequence[ColumnFacts]) -> str:
    """Ask which column is meant, with the likeliest as the default."""
    console = Console(highlight=False)
    console.print(f"Several columns may be the {what}:", markup=False)
    for number, column in enumerate(candidates, start=1):
        console.print(
            f"  {number}  {printable_line(column.name)}: {column.described()}", markup=False
        )
    at: int = typer.prompt(f"Which one is the {what}?", default=1, type=int)
    if not 1 <= at <= len(candidates):
        raise UsageError(f"expected a number from 1 to {len(candidates)}, got {at}")
    return candidates[at - 1].name


def _summary(found: FoundData) -> dict[str, object]:
    return {
        "task": found.task,
        "rows": found.rows,
        "validation_rows": found.validation_rows,
        "text": found.text,
        "text_pair": found.text_pair,
        "label": found.label,
        "labels": found.labels,
        "multilabel": found.multilabel,
        "label_separator": found.label_separator,
        "classes": found.classes,
        "scores": found.scores,
        "notes": found.notes,
    }


def _show(found: FoundData, plan: Starter, target: Path) -> None:
    console = Console(highlight=False)
    rows = f"{found.rows:,} row{'s' if found.rows != 1 else ''}"
    rows += f", and {found.validation_rows:,} for validation" if found.validation_rows else ""
    console.print(Text(f"{found.path}: {_kind(found)}, {rows}", style="bold"))
    if found.columns:
        console.print(_column_table(found))
    for name, value in _facts(found, plan):
        console.print(Text.assemble((f"{name:<9}", "dim"), printable_line(value)))
    for note in found.notes:
        console.print(Text(f"note: {printable_line(note)}", style="dim"))
    console.print()
    console.print(Text(f"wrote {target}. Next:"), soft_wrap=True)
    console.print(Text(f"  sparsegrad train {shlex.quote(str(target))}"), soft_wrap=True)
    use = "generate" if found.is_chat else "predict"
    texts = 0 if found.is_chat else 2 if found.text_pair else 1
    more = "".join([' "a text"', ' "another text"'][:texts])
    run = shlex.quote(str(target.parent / plan.output_dir))
    console.print(Text(f"  sparsegrad {use} {run}{more}"), soft_wrap=True)


def _kind(found: FoundData) -> str:
    if found.is_chat:
        return "conversations"
    if found.multilabel:
        return "texts with several labels each"
    return "texts with scores" if found.scores else "texts with classes"


def _column_table(found: FoundData) -> Table:
    roles = {found.text: "text", found.text_pair: "second text", found.label: "label"}
    roles |= dict.fromkeys(found.labels, "label")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("column", "holds", "for example", "used as"):
        table.add_column(name)
    for column in found.columns:
        example = printable_line(column.example)
        shown = example if len(example) <= _EXAMPLE else f"{example[: _EXAMPLE - 1]}…"
        used = roles.get(column.name, "")
        table.add_row(*map(Text, (column.name, column.described(), shown, used)))
    return table


def _facts(found: FoundData, plan: Starter) -> list[tuple[str, str]]:
    facts = []
    if found.classes:
        counts = [f"{separable(name)} {count:,}" for name, count in found.classes.items()]
        more = f" and {len(counts) - _CLASSES:,} more" if len(counts) > _CLASSES else ""
        name = "labels" if found.multilabel else "classes"
        facts.append((name, f"{', '.join(counts[:_CLASSES])}{more} in the rows to train on"))
    if found.scores:
        facts.append(("scores", f"from {found.scores[0]:g} to {found.scores[1]:g}"))
    if plan.longest is not None:
        kept = f"at most {plan.longest} in a row; the first {plan.max_length} of a row are read"
        facts.append(("tokens", kept))
    facts.append(("model", plan.model))
    return facts
