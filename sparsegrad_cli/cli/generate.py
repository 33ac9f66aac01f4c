"""``sparsegrad generate``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, MovedPaths, Quiet, refuse_without_effect
from sparsegrad_cli.cli.output import report_line, rewrite_study_report
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsegrad_cli.generate.options import GenerateOptions
    from sparsegrad_cli.records.answers import AnswersRecord

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run of a chat task, an exported folder, a model's folder, a hub id, "
        "builtin:smollm2, or a comparison of chat tasks, whose models all answer.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="Ask a single question.", show_default=False)
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="File of questions: JSON lines as in MT-Bench or with `prompt`, or plain lines "
        "(or builtin:questions).",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", help="System prompt (default: that of the chat template)."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Largest number of tokens in an answer.")
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        "-t",
        min=0.0,
        help="Sampling temperature; 0 always takes the most likely token.",
    ),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Sample from the most likely tokens with this probability."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed for sampling.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Questions per batch.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File to add answers to (default for --prompts: runs/answers/<...>.jsonl).",
        show_default=False,
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:1 (default: a GPU, if there is one)."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="For a plain model: float32, bfloat16 or float16 (default: that of its files).",
    ),
]


def generate(
    run: RunOrModel,
    overrides: MovedPaths = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 4,
    output: Output = None,
    device: DeviceName = None,
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Ask a trained or plain model: one prompt, a file of questions, or a conversation.

    Without a prompt, the command reads turns line by line from the terminal or a pipe. Answers to a
    file of questions are kept, so the same command answers only the missing ones. The report of a
    comparison shows the answers of its models side by side.

    [bold]sparsegrad generate runs/chat --prompts builtin:questions[/bold]
    """
    from sparsegrad_cli.generate.answer_files import is_study
    from sparsegrad_cli.generate.options import GenerateOptions, ModelOptions
    from sparsegrad_cli.tasks.generation_settings import GenerationSettings

    settings = GenerationSettings(system, max_new_tokens, temperature, top_p, seed)
    model = ModelOptions(run, tuple(overrides or ()), device, dtype)
    options = GenerateOptions(model, settings, prompts, prompt, batch_size, output)
    _check(options, as_json=as_json)
    if is_study(run):
        _check_for_study(options)
        _answer_study(options, as_json=as_json, quiet=quiet)
    elif prompt is None and prompts is None:
        _converse(options, quiet=quiet)
    else:
        _answer(options, as_json=as_json, quiet=quiet)


def _check(options: GenerateOptions, *, as_json: bool) -> None:
    """Refuse options that exclude each other or have no effect."""
    settings = options.settings
    for option, given in (("--top-p", settings.top_p != 1), ("--seed", settings.seed != 0)):
        if given and settings.greedy:
            why = "--temperature 0 always takes the most likely token"
            refuse_without_effect(option, why, "--temperature 0.7, or leave it out")
    if options.prompt is not None and options.questions is not None:
        raise UsageError("--prompt and --prompts exclude each other")
    if options.prompt is not None and not options.prompt.strip():
        raise UsageError("the prompt is empty", where="--prompt")
    conversation = options.prompt is None and options.questions is None
    if conversation and (as_json or options.output is not None):
        raise UsageError("--json and --output need --prompt or --prompts")


def _check_for_study(options: GenerateOptions) -> None:
    """Refuse options that apply to one model only."""
    study = options.model.source
    if options.prompt is None and options.questions is None:
        raise UsageError(
            f"a conversation needs one model, and {study} is a comparison",
            fix=f"--prompts FILE asks all its models; {study}/cells holds them one by one",
        )
    for option, given in (("--output", options.output), ("--dtype", options.model.dtype)):
        if given is not None:
            raise UsageError(
                f"{option} applies to one model; the runs of a comparison have their own",
                where=option,
            )


def _converse(options: GenerateOptions, *, quiet: bool) -> None:
    """Answer turns from standard input until it ends."""
    from sparsegrad_cli.cli.chat import Chat
    from sparsegrad_cli.generate.options import generation_errors

    if sys.stdin is None:
        raise UsageError("standard input is closed", fix="--prompt TEXT or --prompts FILE")
    # A character that the terminal's encoding lacks must not end the conversation.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # Arrow keys and history for input().

    with generation_errors():
        with make_observer(quiet) as observer:
            from sparsegrad_cli.generate.load_chat_model import load_answerer

            answerer, about = load_answerer(options.model, options.settings, observer)
            for note in answerer.notes:
                observer.note(note)
        Chat(answerer, source=sys.stdin, out=sys.stdout, err=sys.stderr).run(about)


def _answer(options: GenerateOptions, *, as_json: bool, quiet: bool) -> None:
    """Answer a prompt or a file of questions with one model."""
    from sparsegrad_cli.generate.options import generation_errors
    from sparsegrad_cli.io.untrusted_text import printable_text

    questions = options.read_questions()
    with make_observer(quiet or as_json) as observer, generation_errors():
        from sparsegrad_cli.generate.answer_questions import answer_questions
        from sparsegrad_cli.generate.load_chat_model import load_answerer

        answerer, about = load_answerer(options.model, options.settings, observer)
        record = answer_questions(answerer, about, questions, options, observer)
    if as_json:
        typer.echo(json.dumps(record))
    elif options.prompt is not None:
        typer.echo(printable_text(record["answers"][0]["answers"][0]))
    else:
        _show_summary(record)


def _show_summary(record: dict[str, Any]) -> None:
    """Show how much was answered, how fast, and where the answers are."""
    from rich.console import Console
    from rich.text import Text

    from sparsegrad_cli.report.terminal import plain_line
    from sparsegrad_cli.report.units import format_count, format_seconds

    lines = record["answers"]
    tokens = sum(sum(line["answer_tokens"]) for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
    console = Console(highlight=False)
    console.print(
        Text(
            f"{record['asked']} questions answered, {record['kept']} kept: "
            f"{format_count(tokens)} tokens in {format_seconds(seconds)}{rate}"
        )
    )
    console.print(plain_line(f"Answers: {record['output']}"))


def _answer_study(options: GenerateOptions, *, as_json: bool, quiet: bool) -> None:
    """Ask all models of a comparison; exit with 1 if one of them could not be asked."""
    from sparsegrad_cli.generate.options import generation_errors

    questions = options.read_questions()
    with make_observer(quiet or as_json) as observer, generation_errors():
        from sparsegrad_cli.generate.answer_study import answer_study

        record = answer_study(options, questions, observer)
    study = Path(options.model.source).expanduser()
    if record.output is not None:
        rewrite_study_report(study)
    if as_json:
        typer.echo(json.dumps(record.to_json()))
    else:
        _show_study(record, study)
    if record.status != "done":
        raise typer.Exit(1)


def _show_study(record: AnswersRecord, study: Path) -> None:
    """Show the answers to a single prompt, or what every model answered of a file."""
    from rich.console import Console

    from sparsegrad_cli.io.untrusted_text import printable_text
    from sparsegrad_cli.report.answers import column_label, column_outcome
    from sparsegrad_cli.report.terminal import plain_line

    console = Console(highlight=False)
    kept = record.output is not None
    for column in record.columns:
        parts = plain_line(column_label(column), "bold").append("  ")
        if kept or column.status != "done":
            console.print(parts.append(plain_line(column_outcome(column))))
            continue
        console.print(parts)
        typer.echo(printable_text(column.answers[0].answers[0]) + "\n")
    if kept:
        console.print(plain_line(report_line(study)))
