"""Relative paths follow the recipe, and a run's folder can be used from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder

from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.study import load_study

RECIPE = """\
model: mymodel
task: {name: csv, path: data, max_length: 16}
method: {name: lora, rank: 2}
train: {max_steps: 1, per_device_train_batch_size: 8, use_cpu: true}
output_dir: out
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a model, data and a recipe that names both by relative paths."""
    folder = tmp_path / "project"
    base_folder(folder / "mymodel")
    data_folder(folder / "data")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_a_run_does_not_depend_on_the_working_directory(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    trained = cli("train", "../project/recipe.yaml", "-q")
    assert trained.code == 0, trained.err
    assert not any(elsewhere.iterdir())
    run = project / "out"
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["model"]["name"] == str(project / "mymodel")
    assert resolved["task"]["path"] == str(project / "data")
    assert resolved["output_dir"] == str(run)
    monkeypatch.chdir("/")
    for command in (
        ("train", str(run), "--resume", "-q"),
        ("report", str(run)),
        ("export", str(run), "--to", "merged", "-q"),
    ):
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err


def test_each_path_key_is_relative_to_the_file_that_names_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "basis.safetensors").touch()
    (project / "below").mkdir()
    below = project / "below" / "recipe.yaml"
    below.write_text("extends: ../recipe.yaml\nmethod: sparsegrad\noutput_dir: ../runs/a\n")
    monkeypatch.chdir(project / "data")
    recipe = load_recipe(below, ("calibration.basis=../basis.safetensors",)).recipe
    assert recipe.model.name == str(project / "mymodel")
    assert recipe.task.path == str(project / "data")
    assert recipe.output_dir == str(project / "runs" / "a")
    assert recipe.calibration.basis == str(project / "basis.safetensors")
    overridden = load_recipe(below, ("output_dir=here", "model=../mymodel")).recipe
    assert overridden.output_dir == str(project / "data" / "here")
    assert overridden.model.name == str(project / "mymodel")
    assert load_recipe(below, ("model=roberta-base",)).recipe.model.name == "roberta-base"


def test_a_folder_beside_the_recipe_wins_over_one_in_the_working_directory(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other" / "mymodel").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    path = project / "recipe.yaml"
    assert load_recipe(path).recipe.model.name == str(project / "mymodel")


def test_paths_of_a_study_are_relative_to_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "basis.safetensors").touch()
    study = project / "study.yaml"
    study.write_text(
        "recipe: recipe.yaml\n"
        "settings: {task: {path: data}, model: mymodel}\n"
        "tasks: [{name: csv, task: {path: data}}]\n"
        "methods:\n"
        "- lora\n"
        "- {label: core, method: sparsegrad, calibration: {basis: basis.safetensors}}\n"
        "match: null\n"
        "seeds: [1]\n"
        "output_dir: runs/study\n"
    )
    monkeypatch.chdir("/")
    loaded = load_study(study)
    assert loaded.study.output_dir == str(project / "runs" / "study")
    recipes = {cell.label: cell.loaded.recipe for cell in loaded.cells}
    assert {recipe.task.path for recipe in recipes.values()} == {str(project / "data")}
    assert recipes["core"].calibration.basis == str(project / "basis.safetensors")


def test_paths_in_a_run_of_an_earlier_version_are_unchanged(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "runs" / "old"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "run.json").write_text("{}")
    monkeypatch.chdir(project)
    assert load_recipe(run / "recipe.yaml").recipe.task.path == "data"


def test_a_failed_run_that_never_trained_does_not_block_its_folder(cli: Cli, project: Path) -> None:
    recipe = str(project / "recipe.yaml")
    weights = project / "mymodel" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"torn")
    assert cli("train", recipe, "-q").code == 1
    assert json.loads((project / "out" / "run.json").read_text())["status"] == "failed"
    weights.write_bytes(kept)
    assert cli("train", recipe, "-q").code == 0
    again = cli("train", recipe, "-q")  # a run that trained is never replaced without --overwrite
    assert again.code == 2 and "not empty" in again.err


def test_a_failed_run_beside_other_files_is_not_replaced(cli: Cli, project: Path) -> None:
    run = project / "out"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema": 1, "status": "failed"}))
    (run / "notes.txt").write_text("mine")
    assert cli("train", str(project / "recipe.yaml"), "-q").code == 2
    assert (run / "notes.txt").read_text() == "mine"


def test_an_ascii_terminal_does_not_fail_a_finished_run(cli: Cli, project: Path) -> None:
    assert cli("train", str(project / "recipe.yaml"), "-q").code == 0
    shown = subprocess.run(
        [sys.executable, "-m", "sparsegrad_cli", "report", str(project / "out")],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert b"lora" in shown.stdout
