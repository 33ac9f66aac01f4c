"""The report while a comparison runs, and the same numbers in every form of it at the end."""

from __future__ import annotations

import copy
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from samples import compare_record, study_record

from sparsegrad_cli.report import compare_page
from sparsegrad_cli.report.compare_files import LiveReport, write_compare_report
from sparsegrad_cli.report.compare_page import Drawings, write_compare_html
from sparsegrad_cli.report.latex import escape_latex
from sparsegrad_cli.report.tables import escape_markdown
from sparsegrad_cli.study.evidence import evidence


def running(record: dict[str, Any], left: int) -> dict[str, Any]:
    """The record as it was when so many cells were still to come, the first of them running."""
    record = copy.deepcopy(record)
    for cell in record["cells"][-left:]:
        cell |= {"status": "pending", "run": None}
    record["cells"][-left]["status"] = "running"
    return record | {"status": "running"} | evidence(record["cells"])


def test_a_running_page_looks_again_and_says_what_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    live = LiveReport(tmp_path, lines.append)
    page, record = tmp_path / "report.html", study_record()
    live(running(record, 2))
    text = page.read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "46 of 48 cells done; running: glue/cola core-1e-3 seed 7." in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    live(record)
    assert "http-equiv" not in page.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "report.tex"}
    assert not lines


@pytest.mark.parametrize("status", ["done", "failed", "interrupted", "out_of_memory", None])
def test_a_page_that_will_not_change_stands_still(tmp_path: Path, status: str | None) -> None:
    write_compare_html(compare_record() | {"status": status, "cells": []}, tmp_path / "r.html")
    assert "http-equiv" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_only_tasks_in_which_something_finished_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def chart(compare: Any, task: str) -> str:
        drawn.append(task)
        return f"<svg>{task}</svg>"

    monkeypatch.setattr(compare_page, "_CHARTS", ((chart, "a chart"),))
    drawings, record = Drawings(), study_record()
    page = tmp_path / "r.html"
    before = running(record, 2)
    write_compare_html(before, page, (), drawings)
    assert drawn == ["glue/rte", "glue/cola"]
    write_compare_html(before | {"finished": "later", "git": {"commit": "x"}}, page, (), drawings)
    assert drawn == ["glue/rte", "glue/cola"]
    write_compare_html(record, page, (), drawings)  # two cells of cola have finished
    assert drawn == ["glue/rte", "glue/cola", "glue/cola"]
    assert page.read_text(encoding="utf-8").count("<svg>") == 2


def test_a_live_page_that_cannot_be_drawn_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(compare: Any, task: str) -> str:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(compare_page, "_CHARTS", ((broken, "a chart"),))
    lines: list[str] = []
    live, record = LiveReport(tmp_path, lines.append), study_record()
    live(running(record, 2))
    live(running(record, 1))
    assert lines == ["the live report could not be written: no room"]
    with pytest.raises(ZeroDivisionError):  # at the end it is an error
        live(record)


def cells_of_html(text: str) -> list[str]:
    return [
        unescape(re.sub(r"<[^>]*>", "", cell))
        for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", text)
    ]


def test_html_markdown_and_latex_hold_the_same_numbers(tmp_path: Path) -> None:
    """Every table cell of the Markdown is one of the page, and of the LaTeX where that has it."""
    record = study_record()
    write_compare_report(tmp_path, record)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    latex = (tmp_path / "report.tex").read_text(encoding="utf-8")
    shown = {escape_markdown(cell) for cell in cells_of_html(html)}
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "--" not in line]
    for line in rows:
        for cell in re.split(r"(?<!\\)\|", line.strip("| ")):
            assert cell.strip().replace("**", "") in shown, line
    for row in record["rows"]:
        mean = f"{100 * row['score_mean']:.1f} ± {100 * row['score_std']:.1f}"
        low, high = row["score_interval"]
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        for value in (mean, interval, f"{row['touched_targets']:,.0f}"):
            assert value in shown and value in markdown and escape_latex(value) in latex
    for pair in record["tests"]["pairs"]:
        line = f"{pair['a']} − {pair['b']} | 16 | {pair['wins']} : {pair['losses']}"
        assert line in markdown
        assert escape_latex(line).replace(r"\textbar{}", "&") in latex
