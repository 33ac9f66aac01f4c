"""All models of a comparison answer the same questions, and the report shows the answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support.adapter_paths import adapter_path
from support.answered_study import CELLS, make_answered_study
from support.chat_models import chat_turns, load
from support.cli_runs import Cli, Outcome
from support.html_pages import outline
from support.judge_server import Response, judge_server

from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.untrusted_text import printable_text
from sparsegrad_cli.judge.prompts import talk
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

BRIEF = ("--max-new-tokens", "8", "--device", "cpu")
ROWS: list[dict[str, Any]] = [
    {"question_id": "a", "category": "math", "turns": ["2 + 2?", "Twice that?"]},
    {"question_id": "b", "category": "sea", "turns": ["Who came home?"]},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison without answers."""
    return make_answered_study(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the comparison, with questions beside it."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Path(shutil.copytree(made, tmp_path / "s"))


def ask(cli: Cli, *more: str, code: int = 0) -> dict[str, Any]:
    outcome: Outcome = cli("generate", "s", "--prompts", "q.jsonl", *BRIEF, "--json", *more)
    assert outcome.code == code, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def said(column: dict[str, Any]) -> list[list[str]]:
    return [line["answers"] for line in column["answers"]]


def file_of(study: Path, method: str, seed: int) -> Path:
    return study / "cells" / f"chat-{method}-s{seed}" / "answers" / "q.jsonl"


def test_every_finished_run_answers_as_it_does_alone_and_the_base_model_answers_once(
    cli: Cli, study: Path, made: Path
) -> None:
    record = ask(cli)
    base, *runs = record["columns"]
    assert [(run["method"], run["seed"]) for run in runs] == list(CELLS)
    assert (base["method"], base["model"]) == (None, str(made.parent / "base"))
    assert all(column["asked"] == 2 for column in record["columns"])
    assert record == json.loads((study / "answers/q.json").read_text()) | {
        "output": "s/answers/q.json"
    }
    for run in runs:
        loaded = load(study / run["run_dir"])
        alone = Answerer(*loaded[:2], GenerationSettings(max_new_tokens=8))
        first = alone.answer([chat_turns(ROWS[0]["turns"][0]), chat_turns(ROWS[1]["turns"][0])])
        assert [texts[0] for texts in said(run)] == [answer.text for answer in first]
        lines, _ = read_records(study / run["file"])
        assert [line["answers"] for line in lines] == said(run)
        assert lines[0]["digest"] == run["digest"] == loaded[2]["digest"]
        assert said(run) != said(base)
    assert len({column["digest"] for column in record["columns"]}) == 4


def test_answered_questions_are_not_asked_again(cli: Cli, study: Path) -> None:
    first = ask(cli)
    assert [column["asked"] for column in ask(cli)["columns"]] == [0, 0, 0, 0]
    # A kill in the middle of a line: that question, of that run.
    torn = file_of(study, "core", 1)
    torn.write_bytes(torn.read_bytes()[:-40])
    again = ask(cli)
    assert [column["asked"] for column in again["columns"]] == [0, 0, 1, 0]
    assert [said(column) for column in again["columns"]] == [said(c) for c in first["columns"]]
    # Other weights are another model.
    adapter = adapter_path(study / "cells/chat-lora-s1")
    with safe_open(adapter, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter, about)
    other = ask(cli)
    assert [column["asked"] for column in other["columns"]] == [0, 2, 0, 0]
    assert said(other["columns"][1]) != said(first["columns"][1])
    # Other settings ask everybody.
    assert all(column["asked"] == 2 for column in ask(cli, "--max-new-tokens", "5")["columns"])


def test_runs_that_have_answered_are_not_loaded(cli: Cli, study: Path, made: Path) -> None:
    """Their base model is damaged. Only models that need it fail."""
    first, weights = ask(cli), made.parent / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    try:
        record = ask(cli, code=1)
    finally:
        weights.write_bytes(whole)
    assert [column["status"] for column in record["columns"]] == ["failed", "done", "done", "done"]
    assert [said(c) for c in record["columns"][1:]] == [said(c) for c in first["columns"][1:]]
    text = outline((study / "report.html").read_text()).text
    why = " ".join(record["columns"][0]["error"]["what"].split())
    assert any(part.startswith("base model ") and why in part for part in text)


def test_a_model_that_fails_does_not_stop_the_others(cli: Cli, study: Path) -> None:
    (study / "cells/chat-core-s1/basis.safetensors").write_bytes(b"x")
    record = ask(cli, code=1)
    assert [column["status"] for column in record["columns"]] == ["done", "done", "failed", "done"]
    report = (study / "report.md").read_text()
    assert "core, seed 1: failed: " in report and "basis" in record["columns"][2]["error"]["where"]
    for name, _ in CELLS:
        shutil.rmtree(study / f"cells/chat-{name}-s1", ignore_errors=True)
    shutil.rmtree(study / "cells/chat-lora-s2")
    outcome = cli("generate", "s", "--prompts", "q.jsonl", *BRIEF)
    assert outcome.code == 2 and "does not exist" in outcome.flat
    assert "Traceback" not in outcome.err


def test_answers_to_a_prompt_are_not_stored(cli: Cli, study: Path) -> None:
    arguments = ("generate", "s", "-p", "Who came home?", *BRIEF)
    record = json.loads(cli(*arguments, "--json").out)
    shown = cli(*arguments)
    assert shown.code == 0, shown.err
    for column in record["columns"]:
        assert printable_text(said(column)[0][0]) in shown.out
    assert shown.out.index("base model") < shown.out.index("core, seed 1")
    assert record["output"] is None and not list(study.rglob("answers"))


def test_the_report_shows_grades_beside_the_answers(cli: Cli, study: Path) -> None:
    record = ask(cli)
    texts = {
        (c["method"], c["seed"]): said(c)[0][0] for c in record["columns"] if c["method"] != "core"
    }
    assert len(set(texts.values())) == 3

    first = texts["lora", 1]

    def judges(body: dict[str, Any], number: int) -> Response:
        """8 where lora, seed 1, said its first answer; 3 for everything else."""
        prompt = body["messages"][-1]["content"]
        best = all(part in prompt for part in talk(ROWS[0]["turns"][:1], [first], 0)) or all(
            part in prompt for part in talk(ROWS[0]["turns"], [first, "?"], 1)[:2]
        )
        return Response(f"Rating: [[{8 if best else 3}]]")

    with judge_server(judges) as server:
        arguments = ("judge", "s", "--questions", "q.jsonl", "--endpoint", server.url)
        outcome = cli(*arguments, "--model", "judge-1", "-q")
    assert outcome.code == 0, outcome.err
    assert (study / "judge-q" / "verdicts.jsonl").is_file()
    lines = (study / "report.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| **a")]
    assert [cell.rsplit("<br>", 1)[1].strip(" |") for cell in rows[0][1:]] == [
        "*grade 3*",
        "*grade 8*",
        "*grade 3*",
    ]
    # Of lora's first seed both turns of a have 8, b has 3; of its second everything has 3.
    assert "| lora | 4.25 ± 1.77 (n 2) |" in lines
    # An answer made anew has no grade.
    ask(cli, "--max-new-tokens", "3")
    assert "grade 8" not in (study / "report.md").read_text()
    assert "grade 3" not in outline((study / "report.html").read_text()).text


def test_answers_of_a_run_that_was_trained_again_are_marked(cli: Cli, study: Path) -> None:
    ask(cli)
    path = study / "compare.json"
    record = json.loads(path.read_text())
    record["cells"][0]["run"]["finished"] = "2030-01-01T00:00:00+00:00"
    path.write_text(json.dumps(record))
    assert cli("report", "s").code == 0
    assert (
        "lora, seed 1: answered before the run was trained again"
        in (study / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "a conversation needs one model"),
        (("--prompts", "q.jsonl", "-o", "x"), "--output applies to one model"),
        (("--prompts", "q.jsonl", "--dtype", "bfloat16"), "--dtype applies to one model"),
        (("--prompts", "q.jsonl", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
        (("--prompts", "q.jsonl", "method.rank=2"), "cannot be changed after training"),
        (("--prompts", "nowhere"), "builtin:questions"),
    ],
)
def test_wrong_options_are_refused(
    cli: Cli, study: Path, arguments: tuple[str, ...], says: str
) -> None:
    outcome = cli("generate", "s", *arguments)
    assert outcome.code == 2 and says in outcome.flat, outcome.err
    assert "Traceback" not in outcome.err


def test_other_tasks_and_runs_outside_the_folder_are_not_asked(
    cli: Cli, study: Path, tmp_path: Path
) -> None:
    path = study / "compare.json"
    record = json.loads(path.read_text())
    outside = shutil.copytree(study / "cells/chat-lora-s1", tmp_path / "outside")
    record["cells"] = record["cells"][:1]
    record["cells"][0]["run_dir"] = "../outside"
    path.write_text(json.dumps(record))
    outcome = cli("generate", "s", "--prompts", "q.jsonl", *BRIEF)
    assert outcome.code == 2 and "lies outside" in outcome.flat
    assert not (outside / "answers").exists()
    record["cells"][0]["run"]["task"]["kind"] = "classification"
    path.write_text(json.dumps(record))
    outcome = cli("generate", "s", "--prompts", "q.jsonl", *BRIEF)
    assert outcome.code == 2 and "no finished run of a chat task" in outcome.flat
    outcome = cli("judge", "s", "--questions", "q.jsonl", "--endpoint", "http://x", "--model", "m")
    assert outcome.code == 2 and "no model of s has answered q.jsonl" in outcome.flat
