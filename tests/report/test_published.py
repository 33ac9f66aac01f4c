"""Published results next to ours."""

from __future__ import annotations

from typing import Any

import pytest
from support.record_samples import study_of, study_record

from sparsegrad_cli.report.scores import published_table
from sparsegrad_cli.report.units import NOT_RECORDED

RTE, COLA = "glue/rte", "glue/cola"


def table(figures: list[dict[str, Any]], **more: Any) -> list[tuple[Any, ...]]:
    record = study_record() | more
    record["figures"] = [{"source": "paper", "method": "full", **figure} for figure in figures]
    made = published_table(study_of(record))
    assert made is not None
    assert made.header[3:] == ("figure", "published", "ours", "difference")
    return [row[3:] for row in made.rows]


def ours(key: str, task: str) -> float:
    rows = study_record()["rows"]
    value: float = next(r[key] for r in rows if (r["task"], r["method"]) == (task, "full"))
    return value


def test_a_score_is_shown_with_its_spread_and_the_difference() -> None:
    mean, std = ours("score_mean", RTE), ours("score_std", RTE)
    [row] = table([{"task": RTE, "score": 0.688, "std": 0.025}])
    shown = f"{100 * mean:.1f} ± {100 * std:.1f}"
    difference = f"{100 * (mean - 0.688):+.1f}".replace("-", "\u2212")
    assert row == ("score", "68.8 ± 2.5", shown, difference)


def test_speed_and_memory_are_shown_as_ratios_in_the_units_of_the_paper() -> None:
    rate, peak = ours("steps_per_s", RTE), ours("peak_bytes", RTE)
    rows = table([{"task": RTE, "steps_per_s": 4.11, "peak_mb": 1345}])
    assert [row[0] for row in rows] == ["steps/s", "peak, MB"]
    assert rows[0][1:] == ("4.11", f"{rate:.3g}", f"x {rate / 4.11:.3g}")
    assert rows[1][1] == "1,345"
    assert float(rows[1][3].removeprefix("x ")) == pytest.approx(peak / 1345e6, rel=1e-2)


def test_an_average_needs_all_tasks() -> None:
    mean = (ours("score_mean", RTE) + ours("score_mean", COLA)) / 2
    rate = (ours("steps_per_s", RTE) + ours("steps_per_s", COLA)) / 2
    rows = table([{"task": "average", "score": 0.825, "steps_per_s": 2}])
    assert rows[0] == (
        "score",
        "82.5",
        f"{100 * mean:.1f}",
        f"{100 * (mean - 0.825):+.1f}".replace("-", "\u2212"),
    )
    assert rows[1][2] == f"{rate:.3g}"
    rows = table([{"task": "average", "score": 0.825}], tasks=[RTE, COLA, "glue/sst2"])
    assert rows == [("score", "82.5", NOT_RECORDED, NOT_RECORDED)]


def test_a_tuned_learning_rate_is_shown_next_to_that_of_the_paper() -> None:
    best = {"number": 0, "settings": {"train.learning_rate": 6e-5}, "score": 0.5, "loss": 1.0}
    series = {"task": RTE, "method": "full", "best": best}
    rows = table([{"task": RTE, "learning_rate": 3e-5}], tuning={"trials": 1, "series": [series]})
    assert rows == [("tuned learning rate", "3e-05", "6e-05", "x 2")]
    assert table([{"task": RTE, "learning_rate": 3e-5}])[0][2:] == (NOT_RECORDED, NOT_RECORDED)
