"""Reports in a browser: on wide and narrow screens, light and dark, and in print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.browser import Browser, find_browser
from support.record_samples import run_of, run_record, study_of, study_record

from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.report.study import study_document

PHONE, DESK = 390, 1100


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return find_browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def pages(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a run and a study with all sections."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in ("run", "study")}
    documents = {
        "run": run_document(run_of(run_record())),
        "study": study_document(study_of(study_record())),
    }
    for name, path in found.items():
        path.write_text(render(documents[name], "html"), encoding="utf-8")
    return found


@pytest.mark.parametrize("name", ["run", "study"])
def test_no_element_is_wider_than_the_window(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    for width in (PHONE, DESK):
        found = browser.measure(pages[name], width)
        assert found["content"] <= width and found["outside"] == 0, (width, found)
        assert found["text"] >= 8, (width, found)  # legible: drawings scroll, they do not shrink


def test_pages_follow_the_light_and_dark_mode(browser: Browser, pages: dict[str, Path]) -> None:
    light = browser.picture(pages["study"], PHONE, 1500, dark=False)
    dark = browser.picture(pages["study"], PHONE, 1500, dark=True)
    assert light.shape == dark.shape == (1500, PHONE, 3)
    # Paper and ink trade places: most of a page is paper, and some of it is ink.
    assert np.median(light) > 0.95 and np.median(dark) < 0.15
    assert light.min() < 0.3 and dark.max() > 0.7


def test_a_printed_page_is_complete(browser: Browser, pages: dict[str, Path]) -> None:
    assert 1 <= browser.pdf_pages(pages["run"]) <= 8
    assert 2 <= browser.pdf_pages(pages["study"]) <= 14


def test_the_width_check_can_fail(browser: Browser, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    wide.write_text(
        '<body style="margin:0"><p style="width:700px">wide</p>'
        '<svg viewBox="0 0 1000 10" width="300"><text font-size="9">tiny</text></svg>',
        encoding="utf-8",
    )
    found = browser.measure(wide, PHONE)
    assert found == {"content": 700, "outside": 1, "text": pytest.approx(2.7, abs=0.01)}
