"""validate, train and compare report missing packages and faulty data before loading."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Cli
from support.paths import REPO

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe import trackers
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.run import preflight

COMMANDS = ("validate", "train", "calibrate")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hide packages from find_spec."""
    real = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name in names else real(name, *more),
        )

    return hide


def csv_file(path: Path, header: str = "text,label", rows: int = 8) -> Path:
    lines = [f"text {row},{row % 2}" for row in range(rows)]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers.TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_unsupported_weight_formats_are_refused(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert cli("validate", f"model={folder}").code == 0  # without weights, for estimate
    (folder / "pytorch_model.bin").write_bytes(b"")
    told = cli("validate", f"model={folder}")
    assert told.code == 1
    assert "pytorch_model.bin only, expected model.safetensors" in told.flat


@pytest.mark.parametrize("command", ["validate", "train"])
def test_missing_tracker_is_refused_with_its_package(cli: Cli, without: Any, command: str) -> None:
    without("wandb", "tensorboard", "tensorboardX", "comet_ml")
    told = cli(command, "train.report_to=[tensorboard, wandb, comet_ml]")
    assert told.code == 2
    assert "the tracker wandb, whose package is not installed" in told.flat
    assert "pip install comet-ml" in told.flat
    assert "pip install 'sparsegrad[tensorboard]'" in told.flat


def test_calibrate_needs_no_tracker(without: Any) -> None:
    without("wandb")
    loaded = load_recipe(None, ("train.report_to=wandb",))
    preflight.check(loaded, trains=False)
    with pytest.raises(RecipeError):
        preflight.check(loaded, trains=True)


@pytest.mark.parametrize(
    ("report_to", "words"),
    [
        ("tensorbord", "did you mean tensorboard?"),
        ("[none, codecarbon]", "'none' cannot be combined with other trackers"),
    ],
)
def test_unknown_tracker_is_refused(cli: Cli, report_to: str, words: str) -> None:
    told = cli("validate", f"train.report_to={report_to}")
    assert told.code == 2 and words in told.flat


def test_report_to_all_without_a_tracker_is_refused(cli: Cli, without: Any) -> None:
    without(*(name for groups in trackers.TRACKERS.values() for group in groups for name in group))
    told = cli("validate", "train.report_to=all")
    assert told.code == 2 and "stands for the trackers that are installed" in told.flat


def test_quantization_without_bitsandbytes_is_refused(cli: Cli, without: Any) -> None:
    without("bitsandbytes")
    told = cli("validate", "model.quantization=8bit", "method=lora")
    assert told.code == 2 and "pip install 'bitsandbytes" in told.flat


def test_polynomial_schedule_needs_a_rate_above_its_end(cli: Cli) -> None:
    told = cli("validate", "train.lr_scheduler_type=polynomial", "train.learning_rate=1e-8")
    assert told.code == 2 and "train.learning_rate" in told.flat


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_column_is_refused_with_a_suggestion(
    cli: Cli, tmp_path: Path, command: str
) -> None:
    csv_file(tmp_path / "data.csv", "sentence,label")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task:\n  name: csv\n  path: data.csv\n  columns:\n    text: sentense\n")
    told = cli(command, str(recipe), "train.max_steps=1", "train.use_cpu=true")
    assert told.code == 2
    assert "there is no column 'sentense' for the text" in told.flat
    assert "did you mean sentence?" in told.flat
    assert "recipe.yaml:5: task.columns.text" in told.flat
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.jsonl", "data.parquet"])
@pytest.mark.parametrize("whole", [True, False])
def test_columns_are_found_in_files_of_every_kind_and_size(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, whole: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not whole:
        monkeypatch.setattr(preflight, "_WHOLE_BYTES", 0)
        monkeypatch.setattr(preflight, "_HEAD_BYTES", 200)
    path, rows = tmp_path / name, [{"text": f"text {n}", "target": n % 2} for n in range(40)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if "csv" in name:
            text = "text,target\n" + "".join(f"{r['text']},{r['target']}\n" for r in rows)
        packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        path.write_bytes(packed)
    kind = "csv" if "csv" in name else "json" if "json" in name else "parquet"
    told = cli("validate", f"task={kind}", f"task.path={path}")
    assert told.code == 2 and "there is no column 'label'" in told.flat
    named = ("task.columns.label=target", f"task={kind}", f"task.path={path}")
    assert cli("validate", *named).code == 0


def test_validate_finds_faults_in_small_files(cli: Cli, tmp_path: Path) -> None:
    path = csv_file(tmp_path / "data.csv")
    path.write_text(path.read_text() + "one more,\n")
    told = cli("validate", "task=csv", f"task.path={path}")
    assert told.code == 2 and "data.csv:10" in told.flat
    (tmp_path / "folder").mkdir()
    told = cli("validate", "task=csv", f"task.path={tmp_path / 'folder'}")
    assert told.code == 2 and "no training file" in told.flat


def test_validate_finds_chat_files_of_the_wrong_shape(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    told = cli("validate", "task=chat", f"task.path={path}")
    assert told.code == 2 and "no conversation among the columns" in told.flat
    told = cli("validate", "task=chat", f"task.path={path}", "task.metric=accuracy")
    assert told.code == 2 and "not a metric of conversations" in told.flat


def test_study_is_refused_before_any_run_starts(cli: Cli, tmp_path: Path, without: Any) -> None:
    without("wandb")
    study = tmp_path / "study.yaml"
    study.write_text("name: s\nrecipe: recipe.yaml\nmethods: [{method: lora}]\nseeds: [1]\n")
    (tmp_path / "recipe.yaml").write_text("train: {report_to: wandb}\n")
    for command in (("validate", str(study)), ("compare", str(study), "-o", "out")):
        told = cli(*command)
        assert told.code == 2 and "pip install 'sparsegrad[wandb]'" in told.flat, told.err
    assert not (tmp_path / "out").exists()


def test_validate_notes_a_length_above_the_models_positions(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"model_type": "bert", "max_position_embeddings": 32}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    told = cli("validate", f"model={tmp_path / 'model'}", "task.max_length=64")
    assert told.code == 0
    assert "max_length 64 cut to the model's 32 positions" in told.flat


def test_validate_imports_no_torch(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "data.csv")
    code = (
        "import sys\nfrom sparsegrad_cli.cli.output import run_guarded\n"
        "from sparsegrad_cli.cli.app import app\n"
        "code = run_guarded(app)\n"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'transformers')))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "validate", "task=csv", f"task.path={path}"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_every_extra_of_a_tracker_is_declared() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in trackers.EXTRAS:
        assert any(each.startswith(name) for each in project["optional-dependencies"][name])


def test_tracker_files_are_in_the_run_folder_and_a_comparison_is_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith(("WANDB", "TENSORBOARD", "MLFLOW"))]:
        monkeypatch.delenv(key)
    run, names = tmp_path / "study" / "cells" / "task-lora-s1", ("wandb", "tensorboard", "mlflow")
    run.mkdir(parents=True)
    train = TrainSection(report_to=names)
    with trackers.tracker_environment(run, train):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(run / "tensorboard")
        assert os.environ["WANDB_DIR"] == str(run)
        assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "sparsegrad"
        assert os.environ["WANDB_MODE"] == "offline"
        assert "WANDB_RUN_GROUP" not in os.environ and "MLFLOW_RUN_ID" not in os.environ
        assert os.environ["MLFLOW_TRACKING_URI"].startswith(f"sqlite:///{run / 'mlflow'}")
    assert "WANDB_DIR" not in os.environ
    (tmp_path / "study" / "compare.json").write_text("{}")
    trackers.write_ids(run, {"mlflow": "abc", "wandb": "def"})
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with trackers.tracker_environment(run, train):
        assert os.environ["WANDB_RUN_GROUP"] == os.environ["WANDB_PROJECT"] == "study"
        assert os.environ["MLFLOW_TRACKING_URI"].startswith(f"sqlite:///{tmp_path / 'study'}")
        assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "mine"
        assert os.environ["WANDB_RUN_ID"] == "def" and os.environ["MLFLOW_RUN_ID"] == "abc"
    assert trackers.run_name_of(run, train) == "task-lora-s1"
    named = TrainSection(project="p", run_name="night")
    assert trackers.run_name_of(run, named) == "night-task-lora-s1"
    assert trackers.run_name_of(tmp_path / "one", named) == "night"
    assert trackers.project_of(run, named) == "p"
