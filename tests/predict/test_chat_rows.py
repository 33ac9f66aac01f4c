"""`sparsegrad predict` with a chat model: an answer for every row of a file, and for every text."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_models import chat_model_folder, chat_turns, load
from support.cli_runs import Cli
from support.small_runs import train

from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

QUESTIONS = ("Is 12 more?", "And 7?", "Who came home?", "What was old?", "So?")
LIMIT = ("--max-new-tokens", "9")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    data = folder / "chat.jsonl"
    rows = [{"prompt": f"{n}. {QUESTIONS[n % 5]}", "completion": "It is."} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = chat_model_folder(folder / "base", positions=128)
    return train(folder / "run", base, data, "task.name=chat", "task.max_length=64", "method=lora")


@pytest.fixture(scope="module")
def expected(run: Path) -> list[tuple[str, str]]:
    """Return (answer, why it ended) of every question, asked by itself."""
    answerer = Answerer(*load(run)[:2], GenerationSettings(max_new_tokens=9))
    answers = [answerer.answer([chat_turns(question)])[0] for question in QUESTIONS]
    return [(answer.text, answer.stopped) for answer in answers]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_row_gets_the_answer_to_its_question(
    size: int, run: Path, expected: list[tuple[str, str]], cli: Cli, tmp_path: Path
) -> None:
    source = tmp_path / "new.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "question"), *enumerate(QUESTIONS)])
    target = tmp_path / "out.jsonl"
    options = ("-o", str(target), "--batch-size", str(size), *LIMIT)
    ended = cli("predict", str(run), str(source), *options)
    assert ended.code == 0, ended.err
    rows: list[dict[str, Any]] = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["prediction"], row["stopped"]) for row in rows] == expected
    assert [(row["id"], row["question"]) for row in rows] == [
        (str(number), question) for number, question in enumerate(QUESTIONS)
    ]
    cut = sum(stopped != "end" for _, stopped in expected)
    assert "5 rows answered, written to" in ended.flat
    assert (f"{cut} answers were cut at --max-new-tokens" in ended.flat) == (cut > 0)


def test_texts_and_standard_input_are_answered(
    run: Path,
    expected: list[tuple[str, str]],
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = cli("predict", str(run), *QUESTIONS, "--json", *LIMIT)
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [(row["prediction"], row["stopped"]) for row in rows] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(QUESTIONS).encode())))
    assert cli("predict", str(run), "-", "--json", *LIMIT).out == ended.out
    empty = cli("predict", str(run), "", QUESTIONS[0], "--json", *LIMIT)
    assert empty.code == 0 and "1 of them has an empty text." in empty.flat
    assert len(empty.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x", "--probabilities"), "--probabilities has no effect"),
        (("x", "--max-length", "5"), "--max-length has no effect"),
        (("--glue",), "--glue has no effect"),
        (("rows.csv",), "no column 'prompt' or 'question' or 'instruction' or 'text'"),
        (("rows.csv", "--text-column", "b"), "no column 'b' for the questions"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[str, ...],
    says: str,
    run: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "rows.csv").write_text("a,c\n1,2\n")
    monkeypatch.chdir(tmp_path)
    ended = cli("predict", str(run), *arguments)
    assert (ended.code, says in ended.flat) == (2, True), ended.err


def test_an_export_of_a_chat_model_answers(
    run: Path, expected: list[tuple[str, str]], cli: Cli, tmp_path: Path
) -> None:
    adapter = run / "adapter"  # Stands for its run, whose base model it needs.
    found = cli("predict", str(adapter), QUESTIONS[0], "--json", *LIMIT)
    assert json.loads(found.out)["prediction"] == expected[0][0]
