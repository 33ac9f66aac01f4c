"""Comparisons: same start for all, a ledger that survives, cells that fail are rows that say so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats
from small import SMALL, Cli

from sparsegrad_cli.compare.statistics import make_checks, make_rows, paired_difference, std


def cell(method: str, seed: int, score: float, **changes: object) -> dict[str, object]:
    phases = {
        "load": {"peak_bytes": 100, "categories": {"weights": 100}},
        "backward": {"peak_bytes": 150, "categories": {"weights": 110, "other": 40}},
        "optimizer": {"peak_bytes": 130, "categories": {"weights": 110, "other": 20}},
    }
    run = {
        "metrics": {"best": {"score": score, "loss": 1 - score}},
        "memory": {"phases": phases},
        "counts": {"trainable_targets": 10, "trainable": 12, "remainder": 2},
        "time": {"steps_per_s": 4.0 + seed},
        "task": {"metric": "accuracy"},
        "hashes": {"data": "d", "head_init": "h", "order": {"10": "x", "20": method}},
        "sizes": {"adapter_bytes": 5},
    }
    return {
        "task": "t",
        "method": method,
        "seed": seed,
        "status": "done",
        "error": None,
        "run": run,
    } | changes


def test_rows_by_hand() -> None:
    cells = [cell("lora", 0, 0.5), cell("full", 0, 0.6), cell("lora", 1, 0.7), cell("full", 1, 0.9)]
    lora, full = make_rows(cells)
    assert lora["method"] == "lora" and lora["difference"] is None
    assert math.isclose(lora["score_mean"], 0.6)
    assert math.isclose(lora["score_std"], math.sqrt(0.02))
    assert lora["peak_bytes"] == 150 and lora["beyond_weights_bytes"] == 50
    assert lora["steps_per_s"] == 4.5
    assert math.isclose(full["difference"]["mean"], 0.15)
    expected = stats.ttest_rel([0.6, 0.9], [0.5, 0.7]).pvalue
    assert math.isclose(full["difference"]["p"], expected)
    assert "+2 entries" in lora["note"]


def test_failed_and_missing_cells() -> None:
    error = {"title": "x", "what": "memory ran out: 9 GiB\nmore", "where": None, "fix": None}
    cells = [
        cell("full", 0, 0.5, status="out_of_memory", error=error, run=None),
        cell("lora", 0, 0.5),
        cell("lora", 1, 0.5, status="pending", run=None),
    ]
    full, lora = make_rows(cells)
    assert full["status"] == "out_of_memory" and full["score_mean"] is None
    assert full["note"] == "memory ran out: 9 GiB"
    assert lora["status"] == "pending" and lora["seeds_done"] == 1 and lora["score_std"] is None


def test_checks_compare_at_the_last_common_step() -> None:
    same = make_checks([cell("a", 0, 0.5), cell("a", 0, 0.5)])
    assert same[0]["same_order"] is True and same[0]["steps_compared"] == 20
    differ = make_checks([cell("a", 0, 0.5), cell("b", 0, 0.5)])
    assert differ[0]["same_order"] is False and differ[0]["same_head_init"] is True
    one = make_checks([cell("a", 0, 0.5)])
    assert one[0]["same_order"] is None


def test_statistics_of_few() -> None:
    assert std([1.0]) is None and std([1.0, 3.0]) == math.sqrt(2)
    assert paired_difference({1: 0.5}, {2: 0.5}, "x") is None
    single = paired_difference({1: 0.6}, {1: 0.5}, "x")
    assert single is not None and single["p"] is None and single["n"] == 1
    equal = paired_difference({1: 0.6, 2: 0.7}, {1: 0.5, 2: 0.6}, "x")
    assert equal is not None and equal["n"] == 2


@pytest.fixture
def quick() -> tuple[str, ...]:
    return (*SMALL, "train.max_steps=3", "train.eval_steps=3", "train.logging_steps=1")


def test_comparison_is_fair_complete_and_goes_on(
    cli: Cli, tmp_path: Path, quick: tuple[str, ...]
) -> None:
    command = ("compare", "--methods", "lora,meprop", "--seeds", "1", "-o", "c", "-q", *quick)
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert record["status"] == "done"
    assert [row["method"] for row in record["rows"]] == ["lora", "meprop"]
    (check,) = record["checks"]
    assert check["same_order"] and check["same_head_init"] and check["same_data"]
    assert check["steps_compared"] == 3
    asked = record["cells"][0]["run"]["counts"]["requested_target_entries"]
    assert record["cells"][1]["run"]["counts"]["requested_target_entries"] == asked
    assert (tmp_path / "c" / "report.html").stat().st_size > 10_000
    assert "lora" in (tmp_path / "c" / "report.md").read_text()
    # Nothing is run again; one lost cell is.
    before = {c["run_dir"]: c["run"]["finished"] for c in record["cells"]}
    (tmp_path / "c" / record["cells"][1]["run_dir"] / "run.json").unlink()
    assert cli(*command).code == 0
    after = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert after["status"] == "done"
    assert after["cells"][0]["run"]["finished"] == before[after["cells"][0]["run_dir"]]
    # Another comparison does not write over it.
    other = cli("compare", "--methods", "full", "--seeds", "1", "-o", "c", "-q", *quick)
    assert other.code == 2 and "another comparison" in other.flat


def test_a_cell_that_fails_is_a_row_that_says_so(
    cli: Cli, tmp_path: Path, quick: tuple[str, ...]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "name: s\n"
        "methods:\n"
        "  - {label: wild, method: full, train: {learning_rate: 1e+30}}\n"
        "  - full\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    outcome = cli("compare", str(study), "-o", "c", "-q", *quick)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "c" / "compare.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["wild"]["status"] == "failed" and rows["full"]["status"] == "done"
    assert "diverged" in rows["wild"]["note"] or "finite" in rows["wild"]["note"]
    assert record["status"] == "failed"


def test_labels_with_a_dot_keep_their_recipes_apart(
    cli: Cli, tmp_path: Path, quick: tuple[str, ...]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "name: s\nmethods: [{method: full, learning_rates: [2.5e-4, 2.25e-4]}]\nseeds: [1]\n",
        encoding="utf-8",
    )
    outcome = cli("compare", str(study), "-o", "c", "-q", *quick)
    assert outcome.code == 0, outcome.err
    recipes = sorted((tmp_path / "c" / "cells").glob("*.yaml"))
    assert len(recipes) == 2
    assert all((recipe.parent / recipe.name.removesuffix(".yaml")).is_dir() for recipe in recipes)
