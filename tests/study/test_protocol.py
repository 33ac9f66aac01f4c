"""The simulation of the protocol against the formulas it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.protocol import (
    TaskModel,
    by_bootstrap,
    by_crossed,
    by_seeds,
    counts_of,
    draw_right,
    make_data,
    parts_of,
    pseudo,
    score_of,
)
from sparsegrad_cli.recipe.tasks import GLUE_TASKS
from sparsegrad_cli.study.crossed import pseudo_values

COLA = TaskModel(
    "glue/cola",
    "matthews_correlation",
    labels=(60, 140),
    recalls=(0.4, 0.9),
    within=0.88,
    between=0.82,
    run_points=2.0,
)
RTE = replace(COLA, name="glue/rte", metric="accuracy")


@pytest.mark.parametrize("task", [COLA, RTE])
def test_its_pseudovalues_are_those_of_the_test(task: TaskModel) -> None:
    right = np.random.default_rng(0).random((2, 3, task.rows)) < 0.8
    labels = np.repeat([0, 1], task.labels)
    found = pseudo(task, right)
    spec = GLUE_TASKS[task.name.removeprefix("glue/")]
    for method in range(2):
        for seed in range(3):
            given = np.where(right[method, seed], labels, 1 - labels)
            expected = pseudo_values(spec, labels, given)
            assert found[method, seed] == pytest.approx(expected)


@pytest.mark.parametrize("task", [COLA, RTE])
def test_simulated_runs_have_the_scores_and_agreements_of_the_pilot(task: TaskModel) -> None:
    task = replace(task, labels=(6000, 14000), run_points=0.0)
    parts, draw = parts_of(task), np.random.default_rng(1)
    right = draw_right(task, parts, 2, 0.0, (0.0, False), draw)
    for label, part in enumerate((right[..., :6000], right[..., 6000:])):
        assert part.mean() == pytest.approx(task.recalls[label], abs=0.02)
    assert (right[0, 0] == right[0, 1]).mean() == pytest.approx(task.within, abs=0.01)
    assert (right[0, 0] == right[1, 0]).mean() == pytest.approx(task.between, abs=0.01)


def test_simulated_methods_differ_by_the_points_asked_for() -> None:
    task = replace(COLA, labels=(6000, 14000), run_points=0.0)
    parts, draw = parts_of(task), np.random.default_rng(2)
    right = draw_right(task, parts, 20, 4.0, (0.0, False), draw)
    scores = score_of(task, *counts_of(task, right)).mean(axis=1)
    assert scores[0] - scores[1] == pytest.approx(0.04, abs=0.008)


def test_all_tests_find_a_large_difference_and_none_between_equal_answers() -> None:
    parts, draw = parts_of(RTE), np.random.default_rng(3)
    apart = [(RTE, draw_right(RTE, parts, 6, 25.0, (0.0, False), draw))]
    assert max(by_crossed(apart), by_seeds(apart), by_bootstrap(apart, draw)) < 0.01
    same = [(RTE, np.stack([apart[0][1][0]] * 2))]
    assert min(by_crossed(same), by_seeds(same), by_bootstrap(same, draw)) == 1.0


def test_shared_rates_shift_all_seeds_together() -> None:
    parts = parts_of(replace(RTE, labels=(600, 1400), run_points=0.0))
    task = replace(RTE, labels=(600, 1400))
    draw = np.random.default_rng(4)
    spreads = []
    for shared in (True, False):
        means = [
            score_of(
                task, *counts_of(task, draw_right(task, parts, 8, 0.0, (6.0, shared), draw))
            ).mean(axis=1)
            for _ in range(60)
        ]
        spreads.append(float(np.std([one[0] - one[1] for one in means])))
    assert spreads[0] > 2 * spreads[1]


def test_qnli_is_divided_without_overlap(tmp_path: Path) -> None:
    glue = tmp_path / "glue"
    for name in ("CoLA", "RTE", "SST-2", "QNLI"):
        (glue / name).mkdir(parents=True)
        for split in ("train", "dev"):
            rows = [f"{number}\tq{number}\ts\tentailment" for number in range(1200)]
            text = "\n".join(["index\tquestion\tsentence\tlabel", *rows]) + "\n"
            (glue / name / f"{split}.tsv").write_text(text)
    for _ in range(2):
        make_data(glue, tmp_path / "out")
    parts = [
        (tmp_path / "out" / "QNLI" / f"{split}.tsv").read_text().splitlines()
        for split in ("train", "dev")
    ]
    assert [len(part) for part in parts] == [201, 1001]
    assert not set(parts[0][1:]) & set(parts[1][1:])
    assert parts[0][0] == parts[1][0] == "index\tquestion\tsentence\tlabel"
    assert (tmp_path / "out" / "CoLA" / "dev.tsv").read_text().startswith("index")
