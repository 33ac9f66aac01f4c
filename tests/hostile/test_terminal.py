"""Hostile names and texts are shown in the terminal without their control characters."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from rich.console import Console
from support.answered_study import answers_record, save_answers
from support.cli_runs import Cli
from support.hostile_cases import check_error, check_harmless, property_test, scratch_folder
from support.hostile_text import (
    HOSTILE_TEXTS,
    check_markdown,
    check_page,
    damaged_records,
    json_values,
    texts,
)
from support.html_pages import without_figures
from support.record_samples import compare_record, run_record, study_of

from sparsegrad_cli.cli.progress import LineObserver, TerminalObserver
from sparsegrad_cli.errors import (
    DataError,
    DiskError,
    FileFormatError,
    OutOfMemoryError,
    Problem,
    RecipeError,
    SparsegradError,
    UsageError,
)
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.judge.verdicts import read_graded_answers
from sparsegrad_cli.records.answers import JudgeRecord
from sparsegrad_cli.records.export import ExportRecord
from sparsegrad_cli.records.store import validated
from sparsegrad_cli.report.document import Document
from sparsegrad_cli.report.export import export_screen
from sparsegrad_cli.report.judge import judge_document, judge_screen
from sparsegrad_cli.report.render import render, write_study_report
from sparsegrad_cli.report.terminal import plain_line, screen

KINDS = (SparsegradError, DataError, FileFormatError, UsageError, DiskError, OutOfMemoryError)
NAMES = (
    "[red]x[/]",
    "[/]",
    "a\x1b[31mb",
    "a\nb",
    "\u202egnp",
    "<b>x</b>",
    "a|b",
    "[link=x]y",
    "é中",
)


@property_test(
    "any text in an error",
    kind=st.sampled_from(KINDS),
    what=texts().filter(str.strip),
    where=texts().filter(bool),
    fix=st.one_of(st.none(), texts()),
)
def test_errors(kind: type[SparsegradError], what: str, where: str, fix: str | None) -> None:
    block = check_error(kind(what, where=where, fix=fix))
    assert len(block) < 40_000


@property_test("any text in a recipe's error", parts=st.lists(texts(), min_size=4, max_size=4))
def test_recipe_errors(parts: list[str]) -> None:
    key, what, file, fix = (part if part.strip() else "x" for part in parts)
    check_error(
        RecipeError([Problem(key, what, file, 3, fix), Problem(what, key, fix, None, file)])
    )


@property_test(
    "any text in progress", parts=st.lists(texts(), min_size=6, max_size=6), number=st.floats()
)
def test_progress(parts: list[str], number: float) -> None:
    metric = parts[2]
    record = {
        "step": 1,
        "epoch": 0.5,
        "metric": metric,
        "score": 0.5,
        "loss": number,
        "values": {"validation": {metric: 0.5}, parts[3]: {metric: 0.5}},
        "samples": [{"prompt": parts[4], "answer": parts[5]}],
    }
    for kind in (LineObserver, TerminalObserver):
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), kind() as observer:
            observer.phase("load", parts[0])
            observer.note(parts[1])
            observer.total_steps("train", 3)
            observer.step("train", {"step": 1, "loss": number, "rss_bytes": 5})
            observer.evaluated(record)
        check_harmless(shown.getvalue())


def rendered(document: Document) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(screen(document))
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    check_harmless(shown)
    return shown


JUDGED = {
    "schema": 1,
    "mode": "single",
    "status": "failed",
    "judge": "j",
    "endpoint": "http://e",
    "questions": "q.jsonl",
    "answers": [{"model": "m", "file": "a.jsonl", "digest": "0" * 64, "settings": {"seed": 1}}],
    "rows": [
        {"model": "m", "category": None, "mean": 5.0, "standard_error": 0.1, "questions": 2}
        | {"turn_means": [5.0, 6.0], "unreadable": 0, "failed": 1},
    ],
    "requests": {"asked": 2, "kept": 0},
    "failures": ["m, question 1, turn 1: no"],
    "notes": ["n"],
}
PAIRS = JUDGED | {
    "mode": "pairwise",
    "rows": [
        {"models": ["a", "b"], "category": None, "wins": 1, "ties": 0, "losses": 2, "share": 0.3}
        | {"standard_error": 0.1, "flips": 1, "one_order": 0, "first_flips": 1, "failed": 0},
    ],
}
EXPORTED = {
    "schema": 1,
    "to": "lora",
    "run": "runs/a",
    "source": "adapter",
    "model": {"name": "m", "quantization": "4bit"},
    "method": {"name": "lora", "form": None, "support": None},
    "check": {"examples": 3, "answers": 3, "same_answers": 3, "largest_logit": 2.0}
    | {"difference": 1e-6, "judged": {"against": "the run", "difference": 0.0, "tolerance": 1e-4}},
    "error": 0.1,
    "targets": [{"name": "t", "rank": 4, "error": 0.1}],
    "modules": ["classifier"],
    "files": {"a.safetensors": 7},
    "bytes": 7,
    "load": "x = load()",
    "notes": ["n"],
}


@property_test(
    "a damaged judge record", record=damaged_records(lambda: JUDGED, lambda: PAIRS, most=4)
)
def test_judge_output(record: Any) -> None:
    judged = validated(JudgeRecord, record, Path("judge.json"))
    rendered(judge_screen(judged))
    check_markdown(render(judge_document(judged), "md"))


@property_test("a damaged export record", record=damaged_records(lambda: EXPORTED, most=4))
def test_export_output(record: Any) -> None:
    rendered(export_screen(validated(ExportRecord, record, Path("export.json"))))


@st.composite
def talks(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """Draw answers of models and lines of verdicts."""
    said = draw(st.lists(texts(), min_size=2, max_size=2))
    made = answers_record({"base": [said], "lora 1": [said], "core 1": [said]})
    for column in made["columns"]:
        column["run_dir"] = column.get("run_dir")
    damaged = draw(damaged_records(lambda: made, most=6))
    verdict = {"question_id": 0, "turn": 1, "kind": "single", "judge": draw(texts())}
    verdict |= {"status": "decided", "verdict": 7, "messages": [{"content": "q0.0" + said[0]}]}
    lines = [
        json.dumps(verdict | draw(st.dictionaries(st.sampled_from([*verdict]), json_values())))
    ]
    return damaged, [*lines, *draw(st.lists(texts(), max_size=1))]


@property_test("damaged answers and verdicts, in reports", talk=talks())
def test_answers(talk: tuple[dict[str, Any], list[str]]) -> None:
    made, lines = talk
    with scratch_folder() as folder, without_figures(figures=False):
        save_answers(folder, made)
        (folder / "judge-q").mkdir()
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        (folder / "judge-q" / "verdicts.jsonl").write_bytes(content)
        study = study_of(compare_record())
        write_study_report(folder, study, read_graded_answers(folder, study))
        check_page((folder / "report.html").read_text(encoding="utf-8"))
        check_markdown((folder / "report.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_folders_with_hostile_names_are_reported(cli: Cli, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace("/", "∕")
    folder.mkdir()
    write_json_atomic(folder / "run.json", run_record() | {"name": name})
    with without_figures(drawing=False):
        outcome = cli("report", str(folder))
    assert outcome.code == 0, outcome.err
    check_harmless(outcome.out)
    if name.isprintable():
        assert name in outcome.out
    missing = cli("report", str(folder) + "[/]")
    assert missing.code == 2 and "[/] does not exist" in missing.flat
    check_harmless(missing.err)


def test_run_with_another_path_in_its_record_is_reported_by_its_folder(
    cli: Cli, tmp_path: Path
) -> None:
    for said in ({}, {"output_dir": "../elsewhere"}):
        record = {k: v for k, v in run_record().items() if k != "output_dir"}
        write_json_atomic(tmp_path / "run.json", record | said)
        with without_figures(drawing=False):
            outcome = cli("report", str(tmp_path))
        assert outcome.code == 0 and str(tmp_path / "report.html") in outcome.out.replace("\n", "")


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_line_with_file_names_stays_one_line(text: str) -> None:
    line = plain_line(f"Report: {text}")
    assert "\n" not in line.plain
    check_harmless(line.plain)
