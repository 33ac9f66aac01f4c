"""judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet


def judge(
    answers: Annotated[
        list[Path],
        typer.Argument(
            metavar="ANSWERS.jsonl...",
            help="What `sparsegrad generate --prompts` wrote, one model or several; or a "
            "comparison's folder, for all its models.",
            show_default=False,
        ),
    ],
    questions: Annotated[
        str,
        typer.Option(
            "--questions",
            help="The file they answer, or builtin:questions; has categories and references.",
            show_default=False,
        ),
    ],
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            help="An OpenAI-compatible server, such as http://localhost:8000/v1.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", help="The judge's name there.", show_default=False)
    ],
    key_env: Annotated[
        str | None,
        typer.Option(
            "--key-env",
            help="Environment variable with the key; OPENAI_API_KEY if that is set.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder; runs/judge-<answers> by default, or judge-<questions> in a comparison.",
            show_default=False,
        ),
    ] = None,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Compare two models, each pair in both orders.")
    ] = False,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            help="Further tries without a verdict, or on 429, 5xx, network errors.",
        ),
    ] = 2,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")
    ] = 120.0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Requests at a time.")] = 4,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", min=0, help="Of a reply; 0 leaves it to the server."),
    ] = 1024,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a language model grade answers from 1 to 10, turn by turn, or compare two models.

    Answers and questions are sent to the endpoint, and to nobody else. Verdicts are kept: the same
    command asks only for what is missing. A comparison's report shows the grades of its models
    beside their answers. Exit code 1 if a request failed for good.

    [bold]sparsegrad judge a.jsonl b.jsonl --questions builtin:questions
    --endpoint http://localhost:8000/v1 --model judge[/bold]
    """
    from rich.console import Console

    from sparsegrad_cli.cli.progress import ProgressObserver, QuietObserver
    from sparsegrad_cli.io.atomic import without_nan
    from sparsegrad_cli.judge.grades import read_graded_answers
    from sparsegrad_cli.judge.judge_answers import REPORT, JudgeOptions, judge_answers
    from sparsegrad_cli.records.answers import JudgeRecord
    from sparsegrad_cli.records.store import load_study
    from sparsegrad_cli.report.files import write_study_report
    from sparsegrad_cli.report.judge import judge_screen
    from sparsegrad_cli.report.terminal import plain_line, screen

    options = JudgeOptions(
        answers=tuple(answers),
        questions=questions,
        endpoint=endpoint,
        model=model,
        key_env=key_env,
        output=output,
        pairwise=pairwise,
        retries=retries,
        timeout=timeout,
        jobs=jobs,
        max_tokens=max_tokens,
    )
    with QuietObserver() if quiet or as_json else ProgressObserver() as observer:
        record = judge_answers(options, observer)
    if options.study is not None:
        study = load_study(options.study)
        write_study_report(options.study, study, read_graded_answers(options.study, study))
    if as_json:
        typer.echo(json.dumps(record))
    else:
        console = Console()
        console.print(screen(judge_screen(JudgeRecord.model_validate(without_nan(record)))))
        console.print(plain_line(f"Report: {options.folder / REPORT}"))
    if record["status"] != "done":
        raise typer.Exit(1)
