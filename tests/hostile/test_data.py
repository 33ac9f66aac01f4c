"""Hostile data files give usable text or an error with file and line."""

from __future__ import annotations

import math
from pathlib import Path

from support.hostile_cases import property_test, scratch_folder
from support.hostile_data_files import delimited, json_rows, questions
from support.task_data import chat_task, load_task

from sparsegrad_cli.data.chat_files import load_chat_files
from sparsegrad_cli.data.questions import read_questions
from sparsegrad_cli.judge.tasks import read_answers


def tabular(path: Path, kind: str) -> None:
    """Check that texts can be encoded in UTF-8 and labels fit into float32."""
    task = load_task(kind, path=path)
    for part in (task.train, task.validation["validation"]):
        for text in part["text"]:
            assert text.strip() and text.encode("utf-8")
        assert all(math.isfinite(label) for label in part["label"])
    assert all(math.isfinite(value) for value in task.majority.values())


@property_test("any CSV or TSV", content=delimited())
def test_csv_and_tsv_files(content: bytes) -> None:
    with scratch_folder() as folder:
        path = folder / ("d.tsv" if b"\t" in content[:20] else "d.csv")
        path.write_bytes(content)
        tabular(path, "csv")


@property_test("any JSON lines or array, a table", content=json_rows("classes", "scores"))
def test_json_files(content: bytes) -> None:
    with scratch_folder() as folder:
        path = folder / "d.jsonl"
        path.write_bytes(content)
        tabular(path, "json")


@property_test("any JSON lines or array, chats", content=json_rows("chats", "completions"))
def test_chat_files(content: bytes) -> None:
    with scratch_folder() as folder:
        path = folder / "d.jsonl"
        path.write_bytes(content)
        found = load_chat_files(chat_task("chat", path=path))
        for each in (*found.train, *found.validation):
            for turn in each.turns:
                assert turn.text.encode("utf-8")


LINES = json_rows("questions", rows=questions(), most=1)


@property_test("any questions, and answers to them", asked=LINES, told=LINES)
def test_question_and_answer_files(asked: bytes, told: bytes) -> None:
    with scratch_folder() as folder:
        (folder / "q.jsonl").write_bytes(asked)
        (folder / "a.jsonl").write_bytes(told)
        found = read_questions("q.jsonl")
        for question in found:
            assert all(turn.encode("utf-8") for turn in question.turns)
        read_answers([folder / "a.jsonl"], found)
