"""generate."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet, refuse_without_effect
from sparsegrad_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsegrad_cli.generate.options import GenerationSettings, ModelOptions


def generate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run of a chat task, an exported folder, a model's folder, a hub id or "
            "builtin:smollm2; or a comparison of chat tasks, whose models all answer.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="For a run, what lies elsewhere now: model.name=FOLDER, task.path=PATH.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="A file of questions: JSON lines as MT-Bench has them, or with `prompt`, or plain "
            "lines; or builtin:questions.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="What the assistant is told first; else the chat template's own."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of one answer.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens with this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the drawing.")] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Questions at a time.")
    ] = 4,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File that answers are added to; for --prompts runs/answers/<...>.jsonl by "
            "default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, cuda, cuda:1; a GPU if there is one by default."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of a plain model: float32, bfloat16 or float16; as its files by default.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask a trained model, or the one it started from: one prompt, a file of questions, or a talk.

    Without a prompt it reads turns line by line, from the terminal or a pipe. Answers to a file of
    questions are kept: the same command answers only what is missing. A comparison's report shows
    the answers of its models side by side.

    [bold]sparsegrad generate runs/chat --prompts builtin:questions[/bold]
    """
    from sparsegrad_cli.generate.options import GenerationSettings, ModelOptions
    from sparsegrad_cli.generate.side_by_side import is_study

    settings = GenerationSettings(system, max_new_tokens, temperature, top_p, seed)
    for option, given in (("--top-p", top_p != 1), ("--seed", seed != 0)):
        if given and settings.greedy:
            why = "--temperature 0 always takes the likeliest token"
            refuse_without_effect(option, why, "--temperature 0.7, or leave it out")
    model = ModelOptions(run, tuple(overrides or ()), device, dtype)
    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts exclude each other")
    study = is_study(run)
    talk = prompt is None and prompts is None
    if study:
        _check_study(run, talk=talk, output=output, dtype=dtype)
    if talk:
        if as_json or output is not None:
            raise UsageError("--json and --output go with --prompt or --prompts")
        _talk(model, settings, quiet)
        return
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", where="--prompt")
    from sparsegrad_cli.generate.generate import generate as answer
    from sparsegrad_cli.generate.options import GenerateOptions

    options = GenerateOptions(model, settings, prompts, prompt, batch_size, output)
    with _observer(quiet or as_json) as observer:
        record = answer(options, observer)
    if study:
        _finish_study(Path(run).expanduser(), record, as_json)
    elif as_json:
        typer.echo(json.dumps(record))
    elif prompt is not None:
        _show_answer(record)
    else:
        _show_file(record)


def _talk(model: ModelOptions, settings: GenerationSettings, quiet: bool) -> None:
    """Turns from standard input until it ends."""
    from sparsegrad_cli.cli.chat import Chat
    from sparsegrad_cli.generate.generate import generation_errors, load_answerer

    if sys.stdin is None:
        raise UsageError("standard input is closed", fix="--prompt TEXT or --prompts FILE")
    # What is no text in this terminal's encoding must not end a conversation.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history for input()

    with generation_errors():
        with _observer(quiet) as observer:
            answerer, about = load_answerer(model, settings, observer)
            for note in answerer.notes:
                observer.note(note)
        Chat(answerer, source=sys.stdin, out=sys.stdout, err=sys.stderr).run(about)


def _observer(quiet: bool) -> Any:
    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver

    return QuietObserver() if quiet else ProgressObserver()


def _show_answer(record: dict[str, Any]) -> None:
    from sparsegrad_cli.io.untrusted_text import printable_text

    typer.echo(printable_text(record["answers"][0]["answers"][0]))


def _show_file(record: dict[str, Any]) -> None:
    """How much was answered, how fast, and where it lies."""
    from rich.console import Console
    from rich.text import Text

    from sparsegrad_cli.report.terminal import plain_line
    from sparsegrad_cli.report.units import format_count, format_seconds

    made = record["answers"]
    tokens = sum(sum(each["answer_tokens"]) for each in made)
    seconds = sum(each["seconds"] for each in made)
    rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
    console = Console(highlight=False)
    console.print(
        Text(
            f"{record['asked']} questions answered, {record['kept']} kept: "
            f"{format_count(tokens)} tokens in {format_seconds(seconds)}{rate}"
        )
    )
    console.print(plain_line(f"Answers: {record['output']}"))


def _check_study(study: str, *, talk: bool, output: Path | None, dtype: str | None) -> None:
    """Refuse what goes with one model only."""
    if talk:
        raise UsageError(
            f"a conversation is with one model, and {study} is a comparison",
            fix=f"--prompts FILE asks all its models; {study}/cells holds them one by one",
        )
    if output is not None or dtype is not None:
        option = "--dtype" if output is None else "--output"
        raise UsageError(
            f"{option} is for one model: the runs of a comparison have their own", where=option
        )


def _finish_study(study: Path, record: dict[str, Any], as_json: bool) -> None:
    """What a comparison's models answered; exit code 1 if one of them could not be asked."""
    from rich.console import Console

    from sparsegrad_cli.io.atomic import without_nan
    from sparsegrad_cli.io.untrusted_text import printable_text
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.records.answers import AnswersColumn
    from sparsegrad_cli.records.store import load_study
    from sparsegrad_cli.report.answers import column_label, column_outcome
    from sparsegrad_cli.report.files import write_study_report
    from sparsegrad_cli.report.terminal import plain_line

    kept = record["output"] is not None
    if kept:
        compared = load_study(study)
        write_study_report(study, compared, read_graded_answers(study, compared))
    if as_json:
        typer.echo(json.dumps(record))
    else:
        console = Console(highlight=False)
        for column in record["columns"]:
            made = AnswersColumn.model_validate(without_nan(column))
            parts = plain_line(column_label(made), "bold").append("  ")
            if kept or made.status != "done":
                console.print(parts.append(plain_line(column_outcome(made))))
                continue
            console.print(parts)
            typer.echo(printable_text(column["answers"][0]["answers"][0]) + "\n")
        if kept:
            console.print(plain_line(f"Report: {study / 'report.html'}"))
    if record["status"] != "done":
        raise typer.Exit(1)
