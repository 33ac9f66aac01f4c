"""The figures of a study, checked on the matplotlib objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from support.record_samples import compare_record, study_of, study_record
from support.study_cells import cell, evidence_of

from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.study_charts import (
    changed_by_target,
    changed_maps,
    memory_by_phase,
    score_against_memory,
    score_under_budget,
)
from sparsegrad_cli.report.units import MIB


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Collect the figures instead of rendering them."""
    kept: list[Figure] = []

    def keep(figure: Figure) -> str:
        kept.append(figure)
        return "<svg></svg>"

    monkeypatch.setattr("sparsegrad_cli.report.svg.to_svg", keep)
    yield kept


def sized(method: str, seed: int, score: float, mib: int, **more: Any) -> dict[str, Any]:
    """Return a run whose training step peaks at ``mib`` MiB."""
    made = cell(method, seed, score, **more)
    made["run"]["memory"]["phases"]["backward"]["peak_bytes"] = mib * MIB
    made["run"]["method"] = {"name": method.split("-")[0], "form": None, "support": None}
    return made


def study_with(cells: list[dict[str, Any]]) -> StudyRecord:
    return study_of({"cells": cells, **evidence_of(cells)})


def staircases(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for line in lines
    }


@pytest.mark.parametrize(("metric", "better"), [("accuracy", 1), ("loss", -1)])
def test_a_budget_shows_the_best_row_that_fits(
    figures: list[Figure], metric: str, better: int
) -> None:
    """Rows of lora at 100, 200 (worse) and 300 MiB: two steps. Calibration has to fit, too."""
    basis = {"seconds": 1.0, "digest": "x", "peak_bytes": 400 * MIB}
    cells = [
        made
        for seed, luck in ((0, 0.01), (1, -0.01))
        for made in (
            sized("lora-a", seed, 0.5 + better * luck, 100, metric=metric),
            sized("lora-b", seed, 0.5 + better * (luck - 0.1), 200, metric=metric),
            sized("lora-c", seed, 0.5 + better * (luck + 0.2), 300, metric=metric),
            sized(
                "core-a", seed, 0.5 + better * (luck + 0.3), 50, metric=metric, calibration=basis
            ),
        )
    ]
    assert score_under_budget(study_with(cells), "t")
    drawn = staircases(figures[0])
    times = 100 if metric == "accuracy" else 1
    right = 400 + 0.15 * 300
    best = times * (0.5 + better * 0.2)
    assert drawn["lora"] == [
        pytest.approx(point) for point in ((100, times * 0.5), (300, best), (right, best))
    ]
    high = times * (0.5 + better * 0.3)
    assert drawn["core"] == [pytest.approx(point) for point in ((400, high), (right, high))]
    assert all(
        line.get_linestyle() == "-"
        for line in figures[0].axes[0].lines
        if len(np.asarray(line.get_xydata())) > 1 and str(line.get_label()) in drawn
    )


def test_tuners_of_peft_have_curves_of_their_own(figures: list[Figure]) -> None:
    cells = [sized("dora-a", 0, 0.5, 100), sized("shira-a", 0, 0.4, 50)]
    for made, kind in zip(cells, ("LORA", "SHIRA"), strict=True):
        made["run"]["method"] = {"name": "peft", "settings": {"type": kind}}
    score_under_budget(study_with(cells), "t")
    assert set(staircases(figures[0])) == {"dora-a", "shira-a"}


def test_single_seeds_are_dashed_and_have_no_interval(figures: list[Figure]) -> None:
    cells = [sized("lora", 0, 0.5, 100), sized("full", 0, 0.6, 200)]
    score_under_budget(study_with(cells), "t")
    score_against_memory(study_with(cells), "t")
    budget, trade = figures
    assert {
        line.get_linestyle()
        for line in budget.axes[0].lines
        if line.get_label() in ("lora", "full")
    } == {"--"}
    assert not trade.axes[0].containers  # error bars are containers
    more = [*cells, sized("lora", 1, 0.52, 100), sized("full", 1, 0.7, 200)]
    score_against_memory(study_with(more), "t")
    assert len(figures[2].axes[0].containers) == 2


def test_the_interval_is_that_of_the_row(figures: list[Figure]) -> None:
    compare = study_record()
    assert score_against_memory(study_of(compare), "glue/rte")
    rows = [row for row in compare["rows"] if row["task"] == "glue/rte"]
    for row, bar in zip(rows, figures[0].axes[0].containers, strict=True):
        assert isinstance(bar, ErrorbarContainer)
        (segment,) = bar.lines[2][0].get_segments()
        ends = [100 * end for end in row["score_interval"]]
        assert [float(y) for y in segment[:, 1]] == pytest.approx(ends)


def test_memory_has_a_bar_for_every_phase_and_method(figures: list[Figure]) -> None:
    assert memory_by_phase(study_of(study_record()), "glue/rte")
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    phases = ("calibrate", "forward", "backward", "optimizer", "evaluate")
    assert names == [f"{p} · {m}" for p in phases for m in ("lora", "core-1e-3", "full")]


def test_maps_show_which_parameters_changed(figures: list[Figure]) -> None:
    record = study_record()
    assert changed_maps(study_of(record), "glue/rte")
    (image,) = figures[0].axes[0].images  # the one method that leaves parameters out
    assert np.asarray(image.get_array()).tolist() == [[90.0, 20.0], [10.0, 0.0]]
    assert figures[0].axes[0].get_title() == "core-1e-3"
    assert changed_maps(study_of(record), "no task") is None
    for made in record["cells"]:
        made["run"]["counts"]["targets"] = [
            {"name": f"t{n}", "kind": "k", "entries": 2, "out_features": 10, "in_features": 20}
            | {"touched": 2 * (n + 1)}
            for n in range(3)
        ]
    assert changed_by_target(study_of(record), "glue/rte")
    (image,) = figures[1].axes[0].images
    assert np.asarray(image.get_array()).tolist() == [[1.0, 2.0, 3.0]] * 3


def test_a_chart_names_its_units() -> None:
    drawn = score_under_budget(study_of(compare_record()), "builtin:acceptability")
    assert drawn is not None
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    assert "budget: peak with calibration, MiB" in texts
