"""Budgets and tuning in one study: sizes are solved first and used by all trials and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.record_samples import study_of
from support.small_runs import base_folder, data_folder

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.atomic import without_nan
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study import LoadedStudy, load_study
from sparsegrad_cli.records.study import PlanRecord, Trial
from sparsegrad_cli.report.budget import plan_screen
from sparsegrad_cli.report.conclusions import check_lines, parity_table
from sparsegrad_cli.report.document import Table
from sparsegrad_cli.study.budget.solve_study import solve_study
from sparsegrad_cli.study.coordinator import plan_of
from sparsegrad_cli.study.engines import LocalEngine
from sparsegrad_cli.study.folder import StudyFolder, study_digest
from sparsegrad_cli.study.optuna_trials import Pruner, ended_trial, propose
from sparsegrad_cli.study.parity import check_parity
from sparsegrad_cli.study.runs import Runs
from sparsegrad_cli.study.search_space import RATE, first_point, series_of
from sparsegrad_cli.study.trial import TrialRunner
from sparsegrad_cli.study.tuning import Tuning

STUDY = """name: tiny
methods: [lora, meprop]
tasks: [{{name: csv, task: {{path: {place}/data, max_length: 16}}}}]
settings:
  model: {place}/base
  train: {{per_device_train_batch_size: 8, use_cpu: true, max_steps: 6}}
seeds: [1, 2]
tune: {{trials: 2, space: {{weight_decay: [0.0, 0.1]}}}}
match: trainable={entries}
"""


def solved(folder: Path, entries: int) -> LoadedStudy:
    if not (folder / "base").exists():
        base_folder(folder / "base", num_hidden_layers=1, intermediate_size=12)
        data_folder(folder / "data")
    path = folder / "s.yaml"
    path.write_text(STUDY.format(place=folder, entries=entries), encoding="utf-8")
    return solve_study(load_study(path))


def size(recipe: Recipe) -> int | None:
    """A rank, or a number of entries."""
    method = recipe.method
    assert isinstance(method, LoraSettings | MepropSettings)
    return method.rank if isinstance(method, LoraSettings) else method.entries


def tuning_of(study: LoadedStudy, folder: Path) -> Tuning:
    return Tuning(study, StudyFolder(folder), Runs(LocalEngine(1)), print, lambda: None)


def test_trials_and_runs_have_the_solved_size(tmp_path: Path) -> None:
    study = solved(tmp_path, 150)
    sizes = {"lora": 2, "meprop": 150}
    tuning = tuning_of(study, tmp_path)
    tuning.open(make=True)
    for series in series_of(study):
        for number, score in enumerate((0.5, 0.75)):
            told = tuning.store.ended(series.name, 9)
            settings = propose(series.space, told, series.name)
            runner = TrialRunner(series, number, settings, Pruner(told), tuning.store)
            assert size(runner.recipe(101)) == sizes[series.label]
            trial = Trial(
                number=number, settings=settings, status="done", metric="accuracy", score=score
            )
            tuning.store.add(series.name, ended_trial(series.space, trial, {}))
    tuned = tuning.tuned()
    assert tuned is not None and tuned.budget == study.budget
    assert tuned.match_place == study.match_place
    second = {series.label: first_point(series.space, 1)[RATE] for series in series_of(study)}
    for cell in tuned.cells:
        assert size(cell.loaded.recipe) == sizes[cell.label]
        assert cell.loaded.recipe.train.learning_rate == second[cell.label]
    assert study_digest(tuned) != study_digest(study)
    plan = PlanRecord.model_validate(without_nan(plan_of(study)))
    listed, budget = plan_screen(plan).lead
    assert isinstance(listed, Table) and isinstance(budget, Table)
    assert listed.caption.endswith("4 runs, seeds 1, 2, after 2 trials of tuning for each row")
    assert budget.caption.startswith("Budget trainable=150")


def test_trials_of_other_sizes_are_refused(tmp_path: Path) -> None:
    first = tuning_of(solved(tmp_path, 150), tmp_path)
    first.open(make=True)
    again = tuning_of(solved(tmp_path, 150), tmp_path)
    assert again.open(make=False)
    other = tuning_of(solved(tmp_path, 200), tmp_path)
    with pytest.raises(UsageError, match="with other settings"):
        other.open(make=False)


def test_parity_declares_tuned_and_solved_keys_separately(tmp_path: Path) -> None:
    study = solved(tmp_path, 150)
    assert study.budget is not None
    micro = "train.per_device_train_batch_size"
    cut = {micro: 4, "train.gradient_accumulation_steps": 2}
    rows = [{**row, "set": {**row["set"], **cut}} for row in study.budget.to_json()["rows"]]
    cells = []
    for cell in study.cells:  # as a budget and tuning would leave them
        far = cell.label == "lora"
        train = cell.loaded.recipe.train.model_copy(
            update={
                "per_device_train_batch_size": 4 if far else 8,
                "gradient_accumulation_steps": 2 if far else 1,
                "weight_decay": 0.1 if far else 0.0,
            }
        )
        recipe = cell.loaded.recipe.model_copy(update={"train": train})
        cells.append(replace(cell, loaded=replace(cell.loaded, recipe=recipe)))
    both = replace(study, cells=tuple(cells), budget=study.budget.changed(rows=rows))
    parity = check_parity(both).to_json()
    assert parity["flagged"] == []
    declared = {found["key"]: found.get("why") for found in parity["declared"]}
    assert declared == {
        micro: "budget",
        "train.gradient_accumulation_steps": "budget",
        "train.weight_decay": None,
    }
    compare = {"parity": parity, "tasks": ["csv"], "checks": []}
    said = " ".join(line for _, line in check_lines(study_of(compare)))
    assert "settings as tuned for each, micro-batches set for the budget" in said
    table = parity_table(study_of(compare))
    assert table is not None
    assert {row[0]: row[2] for row in table.rows} == {
        micro: "set for the budget",
        "train.gradient_accumulation_steps": "set for the budget",
        "train.weight_decay": "tuned by method",
    }
