"""Hostile records are reported as plain text in every report format."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from support import latex as tex
from support.hostile_cases import check_harmless, property_test, scratch_folder
from support.hostile_text import check_markdown, check_page, damaged_records
from support.html_pages import without_figures
from support.record_samples import compare_record, run_record, study_record

from sparsegrad_cli.cli.report import report


def calibration() -> dict[str, Any]:
    return run_record() | {"command": "calibrate"}


def reported(folder: Path, name: str, record: Any) -> str:
    """Return what ``sparsegrad report`` prints for this record, and check its files."""
    (folder / name).write_text(json.dumps(record))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        report([folder])
    check_harmless(shown.getvalue())
    check_page((folder / "report.html").read_text(encoding="utf-8"))
    check_markdown((folder / "report.md").read_text(encoding="utf-8"))
    if "cells" in record:
        tex.check_latex((folder / "report.tex").read_text(encoding="utf-8"))
    return shown.getvalue()


COMPARISONS = (compare_record, study_record)


RUNS = (run_record, calibration)


@property_test("a damaged run record, in reports", few=8, record=damaged_records(*RUNS))
def test_a_run(record: Any) -> None:
    with scratch_folder() as folder, without_figures(drawing=False):
        reported(folder, "run.json", record)


@property_test(
    "a damaged comparison record, in reports", few=20, record=damaged_records(*COMPARISONS)
)
def test_a_comparison(record: Any) -> None:
    with scratch_folder() as folder, without_figures(figures=False):
        reported(folder, "compare.json", record)


@property_test(
    "a damaged comparison record, in figures",
    few=2,
    many=100,
    record=damaged_records(*COMPARISONS),
)
def test_figures(record: Any) -> None:
    with scratch_folder() as folder, without_figures(drawing=False):
        reported(folder, "compare.json", record)


@property_test(
    "figures of a damaged record, drawn",
    few=0,
    many=30,
    record=damaged_records(*RUNS, *COMPARISONS),
)
def test_drawn_figures(record: Any) -> None:
    with scratch_folder() as folder:
        reported(folder, "compare.json" if "cells" in record else "run.json", record)
