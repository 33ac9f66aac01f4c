"""``sparsegrad judge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsegrad_cli.cli.arguments import Debug, Json, Quiet
from sparsegrad_cli.cli.output import rewrite_study_report, show
from sparsegrad_cli.cli.progress import make_observer

Answers = Annotated[
    list[Path],
    typer.Argument(
        metavar="ANSWERS.jsonl...",
        help="Files written by `sparsegrad generate --prompts`, of one model or several; or the "
        "folder of a comparison, for all its models.",
        show_default=False,
    ),
]
Questions = Annotated[
    str,
    typer.Option(
        "--questions",
        help="File of questions with categories and references, or builtin:questions.",
        show_default=False,
    ),
]
EndpointAddress = Annotated[
    str,
    typer.Option(
        "--endpoint",
        help="Address of an OpenAI-compatible server, such as http://localhost:8000/v1.",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="Name of the judging model there.", show_default=False)
]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        "--key-env",
        help="Environment variable with the key (default: OPENAI_API_KEY, if that is set).",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Output folder (default: runs/judge-<answers>, or judge-<questions> in a comparison).",
        show_default=False,
    ),
]
Pairwise = Annotated[
    bool, typer.Option("--pairwise", help="Compare two models, each pair in both orders.")
]
Retries = Annotated[
    int,
    typer.Option(
        "--retries",
        min=0,
        help="Retries after a reply without a verdict, HTTP 429 or 5xx, or a network error.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Time limit of a request in seconds.")
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Number of requests at a time.")]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        min=0,
        help="Largest number of tokens in a reply; 0 leaves it to the server.",
    ),
]


def judge(
    answers: Answers,
    questions: Questions,
    endpoint: EndpointAddress,
    model: Model,
    key_env: KeyVariable = None,
    output: Output = None,
    pairwise: Pairwise = False,
    retries: Retries = 2,
    timeout: Timeout = 120.0,
    jobs: Jobs = 4,
    max_tokens: MaxTokens = 1024,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a language model grade answers from 1 to 10, turn by turn, or compare two models.

    Answers and questions are sent to the endpoint only. Verdicts are kept, so the same command asks
    only for missing ones. The report of a comparison shows the grades beside the answers. The exit
    code is 1 if a request failed after all retries.

    [bold]sparsegrad judge a.jsonl b.jsonl --questions builtin:questions
    --endpoint http://localhost:8000/v1 --model judge[/bold]
    """
    from sparsegrad_cli.judge.judge_answers import REPORT, JudgeOptions, judge_answers
    from sparsegrad_cli.report.judge import judge_screen

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
    with make_observer(quiet or as_json) as observer:
        record = judge_answers(options, observer)
    if options.study is not None:
        rewrite_study_report(options.study)
    footer = f"Report: {options.folder / REPORT}"
    show(record.to_json(), judge_screen(record), as_json=as_json, footer=footer)
    if record.status != "done":
        raise typer.Exit(1)
