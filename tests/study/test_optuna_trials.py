"""Proposals are a function of earlier results; the pruner compares with the median."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import REPO

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.records.study import CellStatus, Trial
from sparsegrad_cli.study.optuna_trials import (
    FIRST,
    NEXT_SEED,
    Pruner,
    TrialStore,
    ended_trial,
    propose,
    record_of,
)
from sparsegrad_cli.study.search_space import RATE, Dimension, first_point

SPACE = (
    Dimension(RATE, 1e-4, 1e-2, log=True, centre=1e-3),
    Dimension("train.warmup_steps", 0.0, 0.2),
    Dimension("train.lr_scheduler_type", choices=("linear", "cosine")),
)


def record(
    settings: dict[str, Any], score: float | None, status: CellStatus = "done", number: int = 0
) -> Trial:
    return Trial(number=number, settings=settings, status=status, metric="accuracy", score=score)


def quality(settings: dict[str, Any]) -> float:
    """An objective that is best at 5e-4 with the linear scheduler."""
    off = math.log10(settings[RATE] / 5e-4)
    cosine = settings["train.lr_scheduler_type"] == "cosine"
    return 1 - off * off - (0.2 if cosine else 0.0)


def searched(count: int, told: list[Any] | None = None) -> list[Any]:
    """Return ``count`` trials of a known objective, continued from ``told``."""
    told = list(told or [])
    while len(told) < count:
        settings = propose(SPACE, told, "t lora")
        made = record(settings, quality(settings), number=len(told))
        told.append(ended_trial(SPACE, made, {1: 0.0}))
    return told


def settings_of(trials: list[Any]) -> list[dict[str, Any]]:
    return [record_of(trial).settings for trial in trials]


def test_proposals_are_halton_then_a_function_of_the_results() -> None:
    told = searched(FIRST + 4)
    found = settings_of(told)
    assert found[:FIRST] == [first_point(SPACE, number) for number in range(FIRST)]
    for settings in found:
        assert 1e-4 <= settings[RATE] <= 1e-2 and 0 <= settings["train.warmup_steps"] <= 0.2
    # Repeated, and continued from the middle.
    assert settings_of(searched(FIRST + 4)) == found
    assert settings_of(searched(FIRST + 4, told[: FIRST + 2])) == found
    # TPE proposes something else for other results or another series.
    last = propose(SPACE, told, "t lora")
    turned = [ended_trial(SPACE, record(s, -quality(s)), {1: 0.0}) for s in found]
    assert propose(SPACE, turned, "t lora") != last != propose(SPACE, told, "t full")


def test_tpe_proposes_near_good_trials_and_away_from_failed_ones() -> None:
    rate = SPACE[:1]

    def search(best: float) -> list[float]:
        told: list[Any] = []
        for _ in range(FIRST + 8):
            settings = propose(rate, told, "t lora")
            off = abs(math.log10(settings[RATE] / best))
            fails = off > 1
            made = record(settings, None if fails else -off, "failed" if fails else "done")
            told.append(ended_trial(rate, made, {}))
        return [settings[RATE] for settings in settings_of(told)[FIRST:]]

    low, high = search(3e-4), search(3e-3)
    assert np.median(low) < 1e-3 < np.median(high)
    # TPE still explores: half of the first points failed, but at most one of eight proposals does.
    assert sum(rate > 3e-4 * 10 for rate in low) <= 1
    assert sum(rate < 3e-3 / 10 for rate in high) <= 1


def test_pruner_equals_a_worked_example() -> None:
    """The finished trials have 0.3, 0.4 and 0.8 at steps 1 to 6; the median is 0.4."""

    def finished(level: float, status: CellStatus = "done") -> Any:
        made = record({RATE: 1e-3}, level, status)
        return ended_trial(SPACE[:1], made, dict.fromkeys(range(1, 7), level))

    told = [finished(level) for level in (0.3, 0.4, 0.8)]
    pruned = finished(0.9, status="pruned")  # does not count towards the median
    pruner = Pruner([*told, pruned])
    assert not pruner.stops(1, 0.0)  # nothing is pruned in the first third of six steps
    assert not pruner.stops(2, 0.45)
    assert not pruner.stops(3, 0.1)  # the best so far is above the median
    worse = Pruner(told)
    assert not worse.stops(1, 0.39)
    assert worse.stops(2, 0.39)
    assert not worse.stops(2, 0.0)  # a second report of the same step is ignored
    assert not Pruner(told).stops(2, 0.4)  # not below
    assert not Pruner(told).stops(6, 0.0)  # the last step
    assert not Pruner(told[:2]).stops(3, 0.0)  # too few to compare with
    assert Pruner(told).seen == {}


def test_pruner_compares_a_second_seed_with_second_seeds() -> None:
    levels = (0.3, 0.4, 0.8)
    told = [
        ended_trial(
            SPACE[:1],
            record({RATE: 1e-3}, level),
            {s + step: level + at / 10 for at, s in enumerate((0, NEXT_SEED)) for step in (3, 6)},
        )
        for level in levels
    ]
    pruner = Pruner(told)
    assert not pruner.stops(3, 0.41) and not pruner.stops(6, 0.42)
    assert pruner.stops(NEXT_SEED + 3, 0.0)  # 0.42 in all, 0.5 the median of the second seed
    assert not Pruner(told).stops(NEXT_SEED + 6, 0.0)  # the last step of all
    assert Pruner(told).stops(
        6, 0.0
    )  # the last step of the first seed: the second seed does not run


def test_trial_store_keeps_trials_complete_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "tuning.journal"
    told = searched(FIRST + 2)
    for trial in told:
        store = TrialStore(path)  # as if interrupted after every trial
        assert store.open("t lora", {"a": 1})
        store.add("t lora", trial)
    store = TrialStore(path)
    store.open("t lora", {"a": 1})
    kept = store.ended("t lora", 99)
    assert settings_of(kept) == settings_of(told)
    assert [record_of(trial).number for trial in kept] == list(range(FIRST + 2))
    assert [t.intermediate_values for t in kept] == [t.intermediate_values for t in told]
    assert propose(SPACE, kept, "t lora") == propose(SPACE, told, "t lora")
    assert len(store.ended("t lora", 3)) == 3
    assert store.spent("t lora", "run") == 0
    store.spend("t lora", "run", 2.5)
    assert store.spent("t lora", "run") == 2.5
    assert not store.open("t full", {"a": 1}, make=False)
    with pytest.raises(UsageError, match=r"t lora in another space"):
        store.open("t lora", {"a": 2})
    store.forget("t lora", {"a": 2})
    assert store.ended("t lora", 99) == []


def test_trial_store_repairs_a_journal_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "tuning.journal"
    store, told = TrialStore(path), searched(2)
    store.open("s", {"a": 1})
    store.add("s", told[0])
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","study')  # a torn line
    (tmp_path / "tuning.journal.lock").touch()  # Optuna's own lock, which would block
    again = TrialStore(path)
    again.open("s", {"a": 1})
    again.add("s", told[1])
    last = TrialStore(path)
    last.open("s", {"a": 1})
    assert settings_of(last.ended("s", 9)) == settings_of(told)


def test_trial_store_refuses_a_file_that_is_not_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "tuning.journal"
    path.write_bytes(b"SQLite format 4, or so it says" * 100)
    with pytest.raises(FileFormatError, match=r"tuning\.journal cannot be read") as caught:
        TrialStore(path)
    assert caught.value.fix == "restore it from a copy, or name another --output-dir"
    assert path.read_bytes().startswith(b"SQLite format 4")


def test_comparison_without_tuning_imports_no_optuna() -> None:
    code = (
        "import sys, sparsegrad_cli.study.coordinator, sparsegrad_cli.study.tuning\n"
        "import sparsegrad_cli.cli.compare, sparsegrad_cli.report.terminal\n"
        "sys.exit(str([m for m in ('optuna', 'sqlalchemy', 'torch') if m in sys.modules] or ''))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert found.stderr.decode().strip() == ""
