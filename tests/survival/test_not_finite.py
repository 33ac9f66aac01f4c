"""A NaN or infinite loss stops the run before the step and names its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.nan_row import (
    NAN_ROW,
    data_with_nan_row,
    seed_where,
    set_infinite_embedding,
    set_weight,
)
from support.small_runs import base_folder
from support.survival_runs import Workspace, flat, record

from sparsegrad_cli.run.checkpoints import damage

STEP = 3  # the step, and below a batch of it, at which the row comes first


def error_of(run: Path) -> dict[str, Any]:
    found = record(run)
    assert found["status"] == "failed"
    error: dict[str, Any] = found["error"]
    return error


@pytest.mark.parametrize("method", ["full", "core static"])
def test_nan_loss_names_step_batch_rows_and_module_and_keeps_the_checkpoint(
    workspace: Workspace, tmp_path: Path, method: str
) -> None:
    """The embedding of one letter is infinite, and only one row has that letter."""
    base, data = base_folder(tmp_path / "base"), data_with_nan_row(workspace, tmp_path / "data")
    set_infinite_embedding(base)
    seed, order = seed_where(lambda number: number // 3 == STEP - 1)
    number, place = divmod(order.index(NAN_ROW), 5)
    settings = workspace.settings(
        method,
        f"model={base}",
        f"task.path={data}",
        f"seed={seed}",
        "train.train_sampling_strategy=random",
        "calibration.source=random",
        "calibration.steps=12",  # the default: no gradients are taken
        "calibration.warmup_steps=0",
    )
    run = tmp_path / "run"
    ended = workspace.fork_server.run("train", *settings, "-o", str(run))
    assert ended.code == 1
    error = error_of(run)
    rows = order[5 * number : 5 * number + 5]
    assert error["step"] == STEP and error["batch"] == number % 3 + 1
    assert error["rows"] == rows and rows[place] == NAN_ROW
    assert error["module"] == "bert.embeddings.word_embeddings"
    assert error["checkpoint"] == "checkpoint-2" and damage(run / "checkpoint-2") is None
    said = flat(ended)
    assert f"at step {STEP}" in said and f"rows {', '.join(map(str, rows))} of" in said
    assert "first not finite: bert.embeddings.word_embeddings" in said
    assert "last good checkpoint: checkpoint-2" in said
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    steps = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert max(steps) == STEP - 1


def test_divergence_by_learning_rate_is_named(workspace: Workspace) -> None:
    run = workspace.new_run()
    settings = workspace.settings("full", "train.learning_rate=1e30", "train.max_grad_norm=0")
    ended = workspace.fork_server.run("train", *settings, "-o", str(run))
    assert ended.code == 1
    error = error_of(run)
    # One step of 1e30 leaves finite weights with infinite products.
    assert error["step"] > 1 and error["module"].startswith(("bert.", "classifier"))
    assert len(error["rows"]) == 5 and len(set(error["rows"])) == 5
    assert "lower train.learning_rate (now" in flat(ended)
    kept = [path.name for path in run.glob("checkpoint-*") if damage(path) is None]
    assert kept == ([error["checkpoint"]] if error["checkpoint"] else [])


def test_nan_in_calibration_names_step_and_module(workspace: Workspace, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    set_weight(base, "encoder.layer.1.output.dense.weight", (3, 4), float("nan"))
    run = tmp_path / "run"
    settings = workspace.settings("materialized", f"model={base}", "calibration.warmup_steps=0")
    ended = workspace.fork_server.run("train", *settings, "-o", str(run))
    assert ended.code == 1
    error = error_of(run)
    assert error["step"] == 1 and error["module"] == "bert.encoder.layer.1.output.dense"
    assert "calibration step 1" in flat(ended)
    assert not list(run.glob("checkpoint-*")) and not (run / "basis.safetensors").exists()


def test_non_finite_weights_are_not_saved(workspace: Workspace, tmp_path: Path) -> None:
    """A step with a finite loss overflows; its checkpoint would hold the bad weights."""
    base, name = base_folder(tmp_path / "base"), "encoder.layer.1.output.dense"
    set_weight(base, f"{name}.weight", (0, 0), 2.0)  # times 1 - rate x decay: -6.7e38
    run = workspace.new_run()
    settings = workspace.settings(
        "full",
        f"model={base}",
        "train.learning_rate=3.4e37",
        "train.weight_decay=9.9",
        "train.max_grad_norm=0",
        "train.eval_steps=1",
        "train.gradient_accumulation_steps=1",
    )
    ended = workspace.fork_server.run("train", *settings, "-o", str(run))
    assert ended.code == 1
    error = error_of(run)
    # The first step has a warm-up learning rate of zero.
    assert error["step"] == 2 and error["module"] == f"bert.{name}"
    assert error["parameter"] == f"bert.{name}.weight"
    assert "no checkpoint was made of this" in flat(ended)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert damage(run / "checkpoint-1") is None
