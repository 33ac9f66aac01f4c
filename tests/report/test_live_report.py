"""The report of a running study, and equal numbers in all formats at the end."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support.html_pages import without_figures
from support.record_samples import compare_record, study_of, study_record
from support.study_cells import evidence_of

from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report import study as study_report
from sparsegrad_cli.report.document import Drawing, SideBySide
from sparsegrad_cli.report.render import (
    LiveReport,
    escape_latex,
    escape_markdown,
    render,
    write_study_report,
)
from sparsegrad_cli.report.study import ChartCache, study_document


def running(record: dict[str, Any], left: int) -> StudyRecord:
    """Return the record with ``left`` unfinished runs, the first of which is running."""
    record = copy.deepcopy(record)
    for cell in record["cells"][-left:]:
        cell |= {"status": "pending", "run": None}
    record["cells"][-left]["status"] = "running"
    return study_of(record | {"status": "running"} | evidence_of(record["cells"]))


def no_answers(folder: Path, study: StudyRecord) -> Sequence[SideBySide]:
    return []


def test_the_page_of_a_running_study_reloads_and_names_the_current_run(tmp_path: Path) -> None:
    lines: list[str] = []
    live = LiveReport(tmp_path, lines.append, no_answers)
    page, record = tmp_path / "report.html", study_record()
    with without_figures(figures=False):
        live(running(record, 2))
        text = page.read_text(encoding="utf-8")
        assert '<meta http-equiv="refresh" content="30">' in text
        assert "46 of 48 runs done; running: glue/cola core-1e-3 seed 7." in text
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        live(study_of(record))
    assert "http-equiv" not in page.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "report.tex"}
    assert not lines


@pytest.mark.parametrize("status", ["done", "failed", "interrupted", "out_of_memory"])
def test_the_page_of_a_finished_study_does_not_reload(status: str) -> None:
    study = study_of(compare_record() | {"status": status, "cells": []})
    assert "http-equiv" not in render(study_document(study), "html")


def only_chart(monkeypatch: pytest.MonkeyPatch, chart: study_report.Chart) -> None:
    """Let the pages of studies have this chart and no other."""
    plan = study_report.ChartPlan("a title", chart, "a caption", lambda study, task: "alt")
    monkeypatch.setattr(study_report, "SCORES", (plan,))
    for name in ("CURVES", "MEMORY", "CHANGED"):
        monkeypatch.setattr(study_report, name, ())


def test_only_tasks_with_newly_finished_runs_are_drawn_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []

    def chart(study: StudyRecord, task: str) -> Drawing:
        drawn.append(task)
        return Drawing(f"<svg>{task}</svg>")

    only_chart(monkeypatch, chart)
    charts, record = ChartCache(), study_record()

    def page(study: StudyRecord) -> str:
        text = render(study_document(study, (), charts), "html")
        charts.finish_page()
        return text

    before = running(record, 2)
    page(before)
    assert drawn == ["glue/rte", "glue/cola"]
    page(before.changed(finished="later", git={"commit": "x"}))
    assert drawn == ["glue/rte", "glue/cola"]
    last = page(study_of(record))  # two runs of cola have finished
    assert drawn == ["glue/rte", "glue/cola", "glue/cola"]
    assert last.count('<svg role="img"') == 2


def test_an_error_of_the_live_page_is_reported_once_and_does_not_stop_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(study: StudyRecord, task: str) -> Drawing:
        raise ZeroDivisionError("no room")

    only_chart(monkeypatch, broken)
    lines: list[str] = []
    live, record = LiveReport(tmp_path, lines.append, no_answers), study_record()
    live(running(record, 2))
    live(running(record, 1))
    assert lines == ["the live report could not be written: no room"]
    with pytest.raises(ZeroDivisionError):  # at the end it is an error
        live(study_of(record))


def cells_of_html(text: str) -> list[str]:
    return [
        unescape(re.sub(r"<[^>]*>", "", cell))
        for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", text)
    ]


def test_html_markdown_and_latex_have_the_same_numbers(tmp_path: Path) -> None:
    """Every table cell of the Markdown is in the HTML, and the main numbers are in the LaTeX."""
    record = study_record()
    with without_figures(figures=False):
        write_study_report(tmp_path, study_of(record))
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
