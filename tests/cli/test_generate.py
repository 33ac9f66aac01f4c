"""sparsegrad generate, as a user would type it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.chat_models import chat_model_folder
from support.cli_runs import Cli

from sparsegrad_cli.io.jsonl import read_records
from sparsegrad_cli.io.untrusted_text import printable_text

BRIEF = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny random model that writes arbitrary bytes, including control characters."""
    return str(chat_model_folder(tmp_path / "m"))


def test_one_prompt(cli: Cli, model: str) -> None:
    shown = cli("generate", model, "-p", "Hi", *BRIEF)
    assert shown.code == 0, shown.err
    record = json.loads(cli("generate", model, "-p", "Hi", *BRIEF, "--json").out)
    (line,) = record["answers"]
    assert shown.out == printable_text(line["answers"][0]) + "\n"
    assert line["turns"] == ["Hi"] and record["output"] is None
    assert record["model"] == model and record["settings"]["temperature"] == 0.0


def test_control_characters_in_answers_are_escaped(cli: Cli, model: str) -> None:
    """At a high temperature it writes every possible byte."""
    hot = ("generate", model, "-p", "Hi", "-t", "1e4", "--max-new-tokens", "400", "--device", "cpu")
    raw = json.loads(cli(*hot, "--json").out)["answers"][0]["answers"][0]
    controls = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n", "\t"}
    assert len(controls & set(raw)) > 5
    shown = cli(*hot)
    assert shown.code == 0, shown.err
    assert not controls & set(shown.out)
    assert shown.out == printable_text(raw) + "\n"


def test_printable_text_escapes_control_characters() -> None:
    assert (
        printable_text("a\tb\nc [bold]<b> é 日本 👩‍👧 \u00a0")
        == "a\tb\nc [bold]<b> é 日本 👩‍👧 \u00a0"
    )
    assert printable_text("\x1b[2J\x07\r\x00\x7f") == "␛[2J␇␍␀␡"
    assert printable_text("\x9b1m\u202eabc\u2066\ud800") == "\ufffd1m\ufffdabc\ufffd\ufffd"


def test_questions_are_answered_once(cli: Cli, model: str, tmp_path: Path) -> None:
    first = cli("generate", model, "--prompts", "builtin:questions", *BRIEF, "--json")
    assert first.code == 0, first.err
    record = json.loads(first.out)
    assert record["asked"] == 12 and record["kept"] == 0
    path = tmp_path / record["output"]
    assert path.parent == tmp_path / "runs" / "answers" and "questions" in path.name
    lines, _ = read_records(path)
    assert [line["question_id"] for line in lines[:2]] == ["writing-1", "writing-2"]
    again = cli("generate", model, "--prompts", "builtin:questions", *BRIEF)
    assert again.code == 0 and "0 questions answered, 12 kept" in again.out
    assert read_records(path)[0] == lines


def start(folder: Path, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_cli", "generate", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        **more,
    )


@pytest.mark.usefixtures("warm_python")
def test_a_killed_command_continues_where_it_stopped(cli: Cli, model: str, tmp_path: Path) -> None:
    asked = ("--prompts", "builtin:questions", "--max-new-tokens", "40", "-o", "a.jsonl", "-q")
    arguments = (model, *asked, "--device", "cpu", "--batch-size", "1")
    process = start(tmp_path, *arguments)
    path = tmp_path / "a.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, _ = read_records(path)
    outcome = cli("generate", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["kept"] == len(before) < 12
    after, torn = read_records(path)
    assert after[: len(before)] == before and not torn
    assert len({line["question_id"] for line in after}) == len(after) == 12


def read_until(process: subprocess.Popen[bytes], seconds: float = 60.0) -> bytes:
    """Read from a process until a text appears."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, "nothing was written"
    return os.read(process.stdout.fileno(), 65536)


@pytest.mark.usefixtures("warm_python")
def test_a_conversation_works_through_a_pipe(tmp_path: Path) -> None:
    """Ctrl-C stops an answer, /reset starts again, and the end of input ends the command."""
    endless = str(chat_model_folder(tmp_path / "m", positions=100_000, endless=True))
    process = start(
        tmp_path,
        *(endless, "--max-new-tokens", "90000", "--device", "cpu", "-q", "-t", "5"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(b"Tell me everything.\n")
        process.stdin.flush()
        assert read_until(process)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"stopped\n"
        # The first answer is complete; what follows belongs to the second.
        while select.select([process.stdout], [], [], 0)[0]:
            os.read(process.stdout.fileno(), 65536)
        process.stdin.write(b"\n  \n/reset\n/what\nAnd \xff now?\n")
        process.stdin.flush()
        assert process.stderr.readline() == b"a new conversation\n"
        assert b"/exit" in process.stderr.readline()
        assert read_until(process)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"stopped\n"
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert b"Traceback" not in err and b"\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-p", "a", "--prompts", "b"), 2, "exclude each other"),
        (("-p", " "), 2, "empty"),
        (("--json",), 2, "--prompt or --prompts"),
        (("--prompts", "nowhere"), 2, "builtin:questions"),
        (("-p", "a", "--top-p", "0"), 2, "--top-p"),
        (("-p", "a", "--device", "cuda:99"), 2, "--device"),
        (("-p", "a", "--max-new-tokens", "0"), 2, "max-new-tokens"),
        (("model.name=x", "-p", "a"), 2, "applies to runs"),
    ],
)
def test_invalid_options_are_refused(
    cli: Cli, model: str, arguments: tuple[str, ...], code: int, says: str
) -> None:
    outcome = cli("generate", model, *arguments)
    assert outcome.code == code and says in outcome.flat
    assert "Traceback" not in outcome.err


def test_an_output_file_of_another_program_is_refused_and_unchanged(
    cli: Cli, model: str, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    outcome = cli("generate", model, "-p", "a", *BRIEF, "-o", "thesis.txt")
    assert outcome.code == 1 and "found others" in outcome.flat
    assert (tmp_path / "thesis.txt").read_text() == "precious"
