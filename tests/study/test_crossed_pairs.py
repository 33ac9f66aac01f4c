"""The test over seeds and examples of a study, from the answers in its runs' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.study_cells import cell

from sparsegrad_cli.recipe.study_section import ComparisonTest
from sparsegrad_cli.records.study import CellEntry, StudyRecord
from sparsegrad_cli.report.conclusions import pairs_table, verdict_lines
from sparsegrad_cli.report.headline import study_headline
from sparsegrad_cli.run.test_answers import Answer, write_answers
from sparsegrad_cli.study.crossed import crossed, layout
from sparsegrad_cli.study.evidence import evidence, up_to_date
from sparsegrad_cli.study.statistics import holm

ROWS = 120
OVER_BOTH = ComparisonTest(over="seeds_and_examples")


def study(folder: Path, shares: dict[str, float], seeds: int = 3) -> list[CellEntry]:
    """Write runs that answer about these shares of the rows right, by method."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, ROWS)
    entries = []
    for method, share in shares.items():
        for seed in range(seeds):
            right = draw.random(ROWS) < share
            given = np.where(right, labels, 1 - labels)
            run = folder / f"{method}-{seed}"
            run.mkdir()
            pairs = zip(labels.tolist(), given.tolist(), strict=True)
            write_answers(run, [("validation", [Answer(*pair) for pair in pairs])])
            found: dict[str, Any] = cell(method, seed, 0.5, run_dir=run.name)
            score = float(right.mean())
            found["run"]["metrics"]["test"] = {"step": 20, "score": score, "loss": 1 - score}
            found["run"]["task"] = {
                "name": "glue/rte",
                "metric": "accuracy",
                "label_names": ["a", "b"],
                "test_examples": {"validation": ROWS},
            }
            entries.append(CellEntry.model_validate(found))
    return entries


def right_SN(folder: Path, method: str) -> np.ndarray[Any, Any]:
    found = []
    for run in sorted(folder.glob(f"{method}-*")):
        lines = (run / "test.csv").read_text().splitlines()[1:]
        found.append([float(line.split(",")[2] == line.split(",")[3]) for line in lines])
    return np.array(found)


def test_a_pair_is_tested_on_the_answers_of_its_runs(tmp_path: Path) -> None:
    entries = study(tmp_path, {"core": 0.9, "lora": 0.7, "full": 0.8}, seeds=8)
    tests = evidence(entries, OVER_BOTH, tmp_path)["tests"]
    assert [(pair.a, pair.b) for pair in tests.pairs] == [
        ("core", "lora"),
        ("core", "full"),
        ("lora", "full"),
    ]
    expected = []
    for pair in tests.pairs:
        difference = right_SN(tmp_path, pair.a) - right_SN(tmp_path, pair.b)
        by_hand = crossed([layout(difference, difference.mean(axis=1))])
        assert by_hand is not None
        assert pair.mean == pytest.approx(difference.mean())
        assert pair.interval == pytest.approx(list(by_hand.interval()))
        assert pair.p == pytest.approx(by_hand.p())
        expected.append(by_hand.p())
    assert [pair.p_holm for pair in tests.pairs] == pytest.approx(holm(expected))
    assert tests.pairs[0].better == "core"


def test_one_row_against_the_others_and_a_margin(tmp_path: Path) -> None:
    entries = study(tmp_path, {"lora": 0.7, "core": 0.85, "full": 0.85})
    test = ComparisonTest(over="seeds_and_examples", row="core", margins={"full": 0.2})
    tests = evidence(entries, test, tmp_path)["tests"]
    assert [(pair.a, pair.b) for pair in tests.pairs] == [("core", "lora"), ("core", "full")]
    difference = right_SN(tmp_path, "core") - right_SN(tmp_path, "full")
    by_hand = crossed([layout(difference, difference.mean(axis=1))])
    assert by_hand is not None
    margin = tests.pairs[1]
    assert margin.p == pytest.approx(2 * by_hand.p(least=-0.2))
    assert margin.not_inferior and margin.better is None
    record = StudyRecord(cells=entries, **evidence(entries, test, tmp_path))
    assert any(
        "core is non-inferior to full by the margin of 20.0" in line
        for line in verdict_lines(record)
    )
    assert "core is non-inferior to full" in study_headline(record)
    table = pairs_table(record)
    assert table is not None and "non-inferior by 20.0" in str(table)


def test_the_score_of_a_study_is_that_of_the_test_set(tmp_path: Path) -> None:
    entries = study(tmp_path, {"core": 0.9, "lora": 0.7})
    rows = evidence(entries, OVER_BOTH, tmp_path)["rows"]
    assert rows[0].score_mean == pytest.approx(right_SN(tmp_path, "core").mean())


def test_lost_or_damaged_answers_are_named_and_an_earlier_test_is_kept(tmp_path: Path) -> None:
    entries = study(tmp_path, {"core": 0.9, "lora": 0.7})
    record = StudyRecord(cells=entries, **evidence(entries, OVER_BOTH, tmp_path))
    path = tmp_path / "lora-1" / "test.csv"
    kept = path.read_text()
    path.write_text(kept[: len(kept) // 2].rsplit("\n", 1)[0] + "\n")
    tests = evidence(entries, OVER_BOTH, tmp_path)["tests"]
    assert not tests.pairs and tests.untested == 1
    assert "expected 120 answers" in tests.reason and "test.csv" in tests.reason
    path.unlink()
    tests = evidence(entries, OVER_BOTH, tmp_path)["tests"]
    assert "cannot be read" in tests.reason
    lost = record.changed(tests=tests)
    assert any("No difference is tested" in line for line in verdict_lines(lost))
    again = up_to_date(record, running=False, folder=tmp_path)
    assert again.tests == record.tests


def test_more_seeds_do_not_help_where_the_rows_decide(tmp_path: Path) -> None:
    """All seeds give the same answers, so only the choice of rows varies."""
    entries = study(tmp_path, {"core": 0.75, "lora": 0.7}, seeds=1)
    more = []
    for entry in entries:
        for seed in range(3):
            moved = entry.changed(seed=seed)
            more.append(moved)
    tests = evidence(more, OVER_BOTH, tmp_path)["tests"]
    (pair,) = tests.pairs
    assert pair.seeds_needed is None and pair.better is None
