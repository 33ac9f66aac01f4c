"""HTML pages: whole, self-contained, escaped, the same twice, and never stopped by a bad record."""

from __future__ import annotations

import copy
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pages import outline
from samples import compare_record, damaged, run_record, study_record

from sparsegrad_cli.report.compare_page import write_compare_html
from sparsegrad_cli.report.html import write_run_html
from sparsegrad_cli.report.latex import compare_latex
from sparsegrad_cli.report.markdown import compare_markdown


def written(record: dict[str, Any], folder: Path, *, compare: bool = False) -> str:
    path = folder / "report.html"
    (write_compare_html if compare else write_run_html)(record, path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("compare", [False, True])
def test_page_is_well_formed_and_fetches_nothing(tmp_path: Path, compare: bool) -> None:
    found = outline(
        written(compare_record() if compare else run_record(), tmp_path, compare=compare)
    )
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in found.refers)
    assert not {"script", "link", "iframe"} & found.tags
    targets = {ref[1:] for ref in found.refers if ref.startswith("#")}
    assert targets <= set(found.ids)


def test_run_page_says_the_figures(tmp_path: Path) -> None:
    page = written(run_record(), tmp_path)
    text = " ".join(outline(page).text)
    for figure in ("61.0", "219,554", "6.2 steps/s", "140.0 MiB", "majority class", "Calibration"):
        assert figure in text
    # score, loss, energy, heat map, spectra, memory, time, what was touched
    assert page.count("<figure>") == 8


def test_compare_page_says_rows_failures_and_checks(tmp_path: Path) -> None:
    page = written(compare_record(), tmp_path, compare=True)
    text = " ".join(outline(page).text)
    for words in ("65.5 ± 1.2", "3 of 4 cells done", "out of memory", "the device has 8 GiB"):
        assert words in text
    assert "all methods had the same model, head, order, data and precision" in text
    assert "61.2 ± 1.0" in text  # the published figure
    # dots, curves, score under a budget and against memory, memory by method and by phase, speed,
    # what was touched
    assert page.count("<figure>") == 8


@pytest.mark.parametrize("compare", [False, True])
def test_equal_records_give_equal_pages(tmp_path: Path, compare: bool) -> None:
    make = compare_record if compare else run_record
    assert written(make(), tmp_path, compare=compare) == written(make(), tmp_path, compare=compare)


def test_text_of_a_record_stays_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>$x^2$ & _y'
    record = run_record()
    record["name"] = evil
    record["task"]["notes"] = [evil]
    record["error"] = {"what": evil}
    record["calibration"]["energy"]["mean_by_kind"] = {evil: {"original": 0.5}}
    found = outline(written(record, tmp_path))
    assert "script" not in found.tags
    assert any(evil in text for text in found.text)
    comparison = compare_record()
    comparison["methods"][0] = comparison["rows"][0]["method"] = evil
    assert "script" not in outline(written(comparison, tmp_path, compare=True)).tags


def test_study_page_says_what_is_shown_and_what_differs(tmp_path: Path) -> None:
    page = written(study_record(), tmp_path, compare=True)
    text = " ".join(outline(page).text)
    assert "full is better than core-1e-3 by 4.6 (95 % interval 3.9 to 5.4; 16 paired" in text
    assert "No difference shown in the other pair of methods" in text
    assert "methods differ in train.weight_decay (lora 0.0, core-1e-3 0.0, full 0.01)" in text
    for words in ("ever touched in targets", "1,361,222", "seconds a run", "12,400", "won\u00a0:"):
        assert words in text


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not rendered: rendering is matplotlib's, and takes the time."""
    monkeypatch.setattr("sparsegrad_cli.report.svg._draw", lambda figure: "<svg></svg>")


# Every damage in make test-slow, one in eleven here.
SOME = pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])


@SOME
def test_no_run_record_however_damaged_stops_the_page(
    tmp_path: Path, undrawn: None, every: int
) -> None:
    for what, broken in islice(damaged(run_record()), 0, None, every):
        page = written(broken, tmp_path)
        assert page.endswith("</html>\n"), what
        assert not re.search(r">(nan|inf|None)<", page), what


@SOME
def test_no_compare_record_however_damaged_stops_the_page(
    tmp_path: Path, undrawn: None, every: int
) -> None:
    for what, broken in islice(damaged(compare_record()), 0, None, every):
        assert written(broken, tmp_path, compare=True).endswith("</html>\n"), what
    for key in islice(compare_record()["rows"][0], 0, None, every):
        broken = copy.deepcopy(compare_record())
        broken["rows"][0][key] = None
        assert written(broken, tmp_path, compare=True).endswith("</html>\n"), key


def test_damaged_tests_and_parity_stop_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsegrad_cli.report.compare_page._CHARTS", ())
    record = study_record()
    pair, flagged = record["tests"]["pairs"][0], record["parity"]["flagged"][0]
    for block, inside, one in (("tests", "pairs", pair), ("parity", "flagged", flagged)):
        whole = [broken for _, broken in damaged(record[block])]
        whole += [record[block] | {inside: [broken]} for _, broken in damaged(one)]
        for broken in whole:
            damage = record | {block: broken}
            assert written(damage, tmp_path, compare=True).endswith("</html>\n"), broken
            assert compare_markdown(damage) and compare_latex(damage), broken


def test_empty_records_say_that_nothing_is_recorded(tmp_path: Path) -> None:
    assert "not recorded" in written({}, tmp_path)
    assert "0 of 0 cells done" in written({}, tmp_path, compare=True)
