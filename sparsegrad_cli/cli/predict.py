"""``sparsegrad predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sparsegrad_cli.cli.arguments import (
    Debug,
    Json,
    MaxLength,
    PairColumn,
    Quiet,
    TextColumn,
    TrainedModel,
    refuse_without_effect,
)
from sparsegrad_cli.cli.predict_jobs import Job, answer, label
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.paths import expanded, is_file
from sparsegrad_cli.io.untrusted_text import printable_line

if TYPE_CHECKING:
    from sparsegrad_cli.predict.predict_rows import Summary

_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

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
AllProbabilities = Annotated[
    bool, typer.Option("--probabilities", "-p", help="Add the probability of every class.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Rows of a batch (default: 64; 4 of a chat model)."),
]
Glue = Annotated[
    bool,
    typer.Option(
        "--glue",
        help="Label the test split of the run's GLUE task, and write the files of a submission "
        "(CoLA.tsv, ...) into the folder --output (default: glue-submission).",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Tokens of an answer of a chat model (512)."),
]


def predict(
    run: TrainedModel,
    inputs: Inputs = None,
    output: Output = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    all_probabilities: AllProbabilities = False,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    max_new_tokens: MaxNewTokens = None,
    glue: Glue = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Label texts, or the rows of a file, with a trained classifier; let a chat model answer them.

    All columns of a file are kept; prediction and probability are added. A model that gives
    several labels a row adds lists. A chat model adds its answer, and why it ended.

    [bold]sparsegrad predict runs/reviews "a fine film" "dull"[/bold]
    [bold]sparsegrad predict runs/reviews new.csv -o labelled.csv[/bold]
    [bold]sparsegrad predict runs/cola --glue -o submission[/bold]
    """
    given = list(inputs or ())
    overrides = tuple(text for text in given if _is_override(text, glue=glue))
    given = [text for text in given if text not in overrides]
    columns = (text_column, text_pair_column)
    file = None
    if glue:
        _check_glue(given, columns, all_probabilities, as_json)
    else:
        file = _file_of(given)
        _check_inputs(given, file, output, text_column or text_pair_column, as_json)
    from sparsegrad_cli.predict.source import find_source

    with make_observer(quiet or as_json) as observer:
        source = find_source(run)
        job = Job(
            run=run,
            overrides=overrides,
            given=given,
            file=file,
            output=output,
            columns=columns,
            glue=glue,
            batch_size=batch_size or (4 if source.answers else 64),
            all_probabilities=all_probabilities,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            as_json=as_json,
            observer=observer,
        )
        _check_source(job, answers=source.answers)
        summary = answer(job, source) if source.answers else label(job)
    if summary is not None and not quiet and (file is not None or summary.cut or summary.empty):
        text = _sentence(summary, output, answers=source.answers)
        Console(stderr=True, highlight=False).print(text, markup=False)


def _check_source(job: Job, *, answers: bool) -> None:
    """Refuse options that do not fit what the model does."""
    if not answers:
        if job.max_new_tokens is not None:
            refuse_without_effect("--max-new-tokens", f"{job.run} labels texts")
        return
    options = {
        "--glue": job.glue,
        "--probabilities": job.all_probabilities,
        "--max-length": job.max_length,
        "--text-pair-column": job.columns[1],
    }
    for option, value in options.items():
        if value:
            refuse_without_effect(option, f"{job.run} is a chat model, which answers")


def _check_inputs(
    given: list[str], file: Path | None, output: Path | None, column: str | None, as_json: bool
) -> None:
    """Refuse options that do not fit the inputs, or that there are none."""
    if file is None and (output or column):
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
        if file is not None and is_file(output) and output.samefile(file):
            raise UsageError(
                f"{output} is the input file, which the output would replace",
                where="--output",
                fix="name another file",
            )


def _check_glue(
    given: list[str], columns: tuple[str | None, ...], probabilities: bool, as_json: bool
) -> None:
    """Refuse what has no effect with --glue, which reads the test split alone."""
    why = "--glue labels the test split of the run's task"
    if given:
        raise UsageError(f"{why}, got {given[0]!r:.60}", where="command line", fix="leave it out")
    options = ("--text-column", "--text-pair-column", "--probabilities", "--json")
    for option, value in zip(options, (*columns, probabilities, as_json), strict=True):
        if value:
            refuse_without_effect(option, why)


def _is_override(text: str, *, glue: bool) -> bool:
    """Return whether an argument names a path that has moved: ``model.name=FOLDER``."""
    key, sign, _ = text.partition("=")
    keys = ("model.name", "model.trust_remote_code", "train.use_cpu")
    return bool(sign) and (key in keys or (glue and key == "task.path"))


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


def _sentence(summary: Summary, output: Path | None, *, answers: bool) -> str:
    """Return such as ``1,000 rows labelled (positive 612, negative 388), written to out.csv.``."""
    from sparsegrad_cli.predict.predict_rows import empty_words

    written = f", written to {output}" if output is not None else ""
    rows = f"{summary.rows:,} row{'s' if summary.rows != 1 else ''}"
    empty = f" {empty_words(summary.empty)}." if summary.empty else ""
    one = summary.cut == 1
    if answers:
        cut = f" {summary.cut:,} {'answer was' if one else 'answers were'} cut at --max-new-tokens."
        return f"{rows} answered{written}.{empty}{cut if summary.cut else ''}"
    counts = ", ".join(
        f"{printable_line(name)} {count:,}" for name, count in summary.labels.most_common(10)
    )
    if summary.unlabelled:
        counts += f"{', ' if counts else ''}none {summary.unlabelled:,}"
    if not counts and summary.rows:
        counts = f"scores from {summary.lowest:.4g} to {summary.highest:.4g}"
    text = f"{rows} labelled ({counts}){written}.{empty}"
    if summary.cut:
        was = "was" if one else "were"
        text += f" {summary.cut:,} {was} longer than the model reads and {was} cut."
    return text
