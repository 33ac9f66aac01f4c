"""Reports in a browser: on wide and narrow screens, light and dark, and in print.

`make browser-check` runs these tests. Each page is measured once per screen.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import Browser, find_browser
from support.record_samples import run_of, run_record, study_of, study_record

from sparsegrad_cli.records.evaluation import EvaluationRecord
from sparsegrad_cli.report.compared_runs import NamedRun, compared_document
from sparsegrad_cli.report.document import Document
from sparsegrad_cli.report.evaluation import evaluation_document
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.report.study import study_document

pytestmark = pytest.mark.browser

PHONE, NARROW, DESK = 390, 500, 1400
SHEET = 688  # Pixels between the margins of a sheet of A4.
NAMES = ("run", "study", "calibration", "evaluation", "runs")
# (width, dark, paper)
SCREENS = {
    "wide": (DESK, False, False),
    "wide dark": (DESK, True, False),
    "narrow": (NARROW, False, False),
    "narrow dark": (NARROW, True, False),
    "phone": (PHONE, False, False),
    "paper": (SHEET, False, True),
}


def documents() -> dict[str, Document]:
    """Return one document of each kind, with all of its sections."""
    run = run_of(run_record())
    other = run.changed(seed=43, output_dir="runs/other")
    runs = [
        NamedRun("lora", "runs/lora", run, {"seed": 42, "train.learning_rate": 1e-3}),
        NamedRun("other", "runs/other", other, {"seed": 43, "train.learning_rate": 1e-3}),
    ]
    return {
        "run": run_document(run),
        "study": study_document(study_of(study_record())),
        "calibration": run_document(run_of(run_record() | {"command": "calibrate"})),
        "evaluation": evaluation_document(evaluation()),
        "runs": compared_document(runs),
    }


def evaluation() -> EvaluationRecord:
    names = ("negative", "neutral", "positive")
    classes = [
        {"name": name, "rows": 40, "predicted": 38 + at, "precision": 0.9, "recall": 0.7, "f1": 0.8}
        for at, name in enumerate(names)
    ]
    worst = [
        {"place": f"test.csv:{at}", "texts": ["a long text " * 30], "label": "a", "prediction": "b"}
        | {"loss": 3.0 - at / 10}
        for at in range(5)
    ]
    metric = {"value": 0.97, "interval": [0.93, 1.0]}
    return EvaluationRecord.model_validate(
        {"model": "runs/reviews", "about": "lora on roberta-base", "file": "test.csv", "rows": 120}
        | {"cut": 2, "loss": 0.4, "resamples": 1000, "metrics": {"accuracy": metric}}
        | {"classes": classes, "confusion": [[38, 1, 1], [1, 37, 2], [0, 1, 39]], "worst": worst}
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return find_browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def pages(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in NAMES}
    for name, document in documents().items():
        found[name].write_text(render(document, "html"), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def measured(browser: Browser, pages: dict[str, Path]) -> Any:
    """Return a function from a page's name and a screen's to its measurements."""

    @cache
    def measure(name: str, screen: str) -> dict[str, Any]:
        width, dark, paper = SCREENS[screen]
        return browser.measure(pages[name], width, dark=dark, paper=paper)

    return measure


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_fits_and_is_legible_on_every_screen(measured: Any, name: str, screen: str) -> None:
    found = measured(name, screen)
    assert found["content"] <= SCREENS[screen][0] and found["outside"] == [], found["outside"]
    assert found["scrolled"] == 0  # drawings fit their box
    assert found["text"] >= 8, found["text"]  # and stay legible
    assert found["collisions"] == []
    assert found["contrast"][0] >= 1, found["contrast"]
    legends, below = found["legends"]
    assert legends == below and (legends > 0) == (name != "evaluation")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_and_loads_nothing(measured: Any, name: str) -> None:
    found = measured(name, "wide")
    assert found["unresolved"] == found["repeated"] == found["unnamed"] == []
    assert found["requests"] == [] and found["console"] == []


def number(cell: str) -> float | None:
    """Return the first figure of a cell; None if it begins with a word."""
    found = re.match(r"[<≥+]?\s*([-−]?[\d,]*\.?\d+)", cell)
    return float(found[1].replace(",", "").replace("−", "-")) if found else None


@pytest.mark.parametrize("name", NAMES)
def test_tables_sort_by_any_column(measured: Any, name: str) -> None:
    columns = measured(name, "wide")["sorted"]
    assert columns or name == "runs"  # Two runs are not sorted.
    for before, up, down in columns:
        assert sorted(before) == sorted(up) == sorted(down)
        rising = [value for cell in up if (value := number(cell)) is not None]
        falling = [value for cell in down if (value := number(cell)) is not None]
        assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
        if not rising:
            assert [c.casefold() for c in up] == sorted(c.casefold() for c in up)


def test_pages_follow_the_light_and_dark_mode(browser: Browser, pages: dict[str, Path]) -> None:
    light = browser.picture(pages["study"], PHONE, 1500, dark=False)
    dark = browser.picture(pages["study"], PHONE, 1500, dark=True)
    assert light.shape == dark.shape == (1500, PHONE, 3)
    # Paper and ink trade places: most of a page is paper, and some of it is ink.
    assert np.median(light) > 0.95 and np.median(dark) < 0.15
    assert light.min() < 0.3 and dark.max() > 0.7


def test_a_printed_page_is_complete(browser: Browser, pages: dict[str, Path]) -> None:
    assert 1 <= browser.pdf_pages(pages["run"]) <= 8
    assert 2 <= browser.pdf_pages(pages["study"]) <= 16


def test_the_measurements_can_fail(browser: Browser, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    wide.write_text(
        '<body style="margin:0"><p style="width:700px;color:#999">wide</p><a href="#none">x</a>'
        '<svg viewBox="0 0 1000 10" width="300"><text y="9" font-size="9">tiny</text>'
        '<text y="9" font-size="9">over</text></svg><img src="http://none.invalid/x.png">'
        "<script>console.error('wrong')</script>",
        encoding="utf-8",
    )
    found = browser.measure(wide, PHONE)
    assert found["content"] == 700 and len(found["outside"]) == 1
    assert found["text"] == pytest.approx(2.7, abs=0.01)
    assert found["collisions"] == ["tiny / over"] and found["unnamed"] == ["tinyover"]
    assert found["contrast"][0] < 1 and found["contrast"][1] == "wide"
    assert len(found["unresolved"]) == 1 and found["requests"][0].endswith("none.invalid/x.png")
    assert any("wrong" in message for message in found["console"])
