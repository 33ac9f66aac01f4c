"""HTML pages: well-formed, self-contained, escaped, and reproducible."""

from __future__ import annotations

from typing import Any

import pytest
from support.html_pages import outline, without_figures
from support.record_samples import compare_record, run_of, run_record, study_of, study_record

from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.report.study import study_document


def run_page(record: dict[str, Any]) -> str:
    return render(run_document(run_of(record)), "html")


def study_page(record: dict[str, Any]) -> str:
    return render(study_document(study_of(record)), "html")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Return the pages of a run and a study, with figures."""
    return {"run": run_page(run_record()), "study": study_page(compare_record())}


@pytest.mark.parametrize("name", ["run", "study"])
def test_a_page_is_well_formed_and_loads_no_other_file(pages: dict[str, str], name: str) -> None:
    found = outline(pages[name])
    assert all(
        ref.startswith(("#", "data:image/png;base64,", "./cells/")) for ref in found.refers
    ), found.refers
    assert not {"script", "link", "iframe"} & found.tags
    targets = {ref[1:] for ref in found.refers if ref.startswith("#")}
    assert targets <= set(found.ids)
    assert "@import" not in pages[name] and "url(" not in pages[name].replace("url(#", "")


def test_a_run_page_has_the_figures(pages: dict[str, str]) -> None:
    text = " ".join(outline(pages["run"]).text)
    for figure in ("61.0", "219,554", "6.2 steps/s", "140.0 MiB", "majority class", "Calibration"):
        assert figure in text
    # score, loss, energy, gradient maps, spectra, memory, time, what changed
    assert pages["run"].count("<figure>") == 8


def test_a_study_page_has_results_failures_and_checks(pages: dict[str, str]) -> None:
    text = " ".join(outline(pages["study"]).text)
    for words in ("65.5 ± 1.2", "3 of 4 runs done", "out of memory", "the device has 8 GiB"):
        assert words in text
    assert "all methods had the same model, head, order, data and precision" in text
    assert "61.2 ± 1.0" in text  # the published result
    # dots, curves, score under a budget and against memory, memory by method and by phase, speed,
    # what changed
    assert pages["study"].count("<figure>") == 8


def test_equal_records_give_equal_pages(pages: dict[str, str]) -> None:
    assert run_page(run_record()) == pages["run"]


def test_text_of_a_record_is_escaped() -> None:
    hostile = '"><script>alert(1)</script>$x^2$ & _y'
    record = run_record()
    record["name"] = hostile
    record["task"]["notes"] = [hostile]
    record["error"] = {"title": hostile, "what": hostile}
    record["calibration"]["energy"]["mean_by_kind"] = {hostile: {"original": 0.5}}
    found = outline(run_page(record))
    assert "script" not in found.tags
    assert any(hostile in text for text in found.text)
    study = compare_record()
    study["methods"][0] = study["rows"][0]["method"] = hostile
    with without_figures(figures=False):
        assert "script" not in outline(study_page(study)).tags


def test_a_study_page_names_conclusions_and_differences() -> None:
    with without_figures(figures=False):
        page = study_page(study_record())
    text = " ".join(outline(page).text)
    assert "full is better than core-1e-3 by 4.6 (95 % interval 3.9 to 5.4; 16 paired" in text
    assert "No difference shown in the other pair of methods" in text
    assert "methods differ in train.weight_decay (lora 0.0, core-1e-3 0.0, full 0.01)" in text
    for words in ("ever changed in targets", "1,361,222", "seconds per run", "12,400"):
        assert words in text


def test_the_page_of_a_run_that_failed_at_once_says_that_nothing_is_recorded() -> None:
    error = {"title": "Data", "what": "no such file", "where": "x.csv", "fix": "name one"}
    page = run_page({"status": "failed", "error": error})
    text = " ".join(outline(page).text)
    for words in ("no such file", "x.csv", "name one", "Scores: not recorded", "Memory: not rec"):
        assert words in text
    assert "0 of 0 runs done" in study_page({})
