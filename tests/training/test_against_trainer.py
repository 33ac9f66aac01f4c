"""The loop takes the steps of transformers.Trainer: the keys of ``train:`` mean the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.small_runs import base_folder, data_folder, train
from support.tiny_models import one_thread
from transformers import Trainer, TrainingArguments

from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import TargetsSection
from sparsegrad_cli.tasks.task import load_classification

# 48 rows in batches of 5, two a step: the last step of an epoch has one, of 3 rows.
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 5,
    "per_device_eval_batch_size": 7,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 0,
    "max_grad_norm": 0.5,
    "adam_beta2": 0.98,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
}
CASES: dict[str, dict[str, Any]] = {
    "constant": {"lr_scheduler_type": "constant", "max_steps": 4},
    "linear": {"lr_scheduler_type": "linear", "warmup_steps": 0.3, "max_steps": 4},
    "epochs": {"lr_scheduler_type": "cosine", "num_train_epochs": 1.6},
    "smoothed": {"lr_scheduler_type": "constant", "label_smoothing_factor": 0.1, "max_steps": 2},
    "unclipped": {"lr_scheduler_type": "polynomial", "max_grad_norm": 0.0, "max_steps": 3},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model without dropout, whose random draws would differ, and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return base_folder(folder / "base", **still), data_folder(folder / "data")


@pytest.mark.parametrize("case", CASES)
def test_loop_takes_the_steps_of_the_transformers_trainer(
    inputs: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    base, data = inputs
    keys = SHARED | CASES[case]
    task = ("task=csv", "task.max_length=16", f"task.path={data}", f"model={base}", "method=full")
    overrides = tuple(f"train.{key}={json.dumps(value)}" for key, value in keys.items())
    with one_thread():
        parts = load_classification(load_recipe(None, (*task, "task.train_limit=45")))
        model: Any = parts.model
        targets = find_targets(model, TargetsSection())
        load_recipe(None, ("method=full",)).recipe.method.implementation().prepare(
            model, targets, scope="head"
        )
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path / "theirs"), report_to="none", save_strategy="no", **keys
            ),
            train_dataset=parts.train_data,
            eval_dataset=next(iter(parts.validation.values())),
            data_collator=parts.collator,
        )
        # transformers 5.23 takes every model whose forward has **kwargs for one that divides its
        # loss by the items of the step, and adds up the means of the micro-batches.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        limited = ("task.train_limit=45", "method=full", "train.load_best_model_at_end=false")
        unset = () if "max_steps" in keys else ("train.max_steps=-1",)
        run = train(tmp_path / "ours", base, data, *limited, *unset, *overrides)
    found = load_file(adapter_path(run))
    theirs = dict(model.named_parameters())
    assert found and found.keys() <= theirs.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=0, atol=1e-6)
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    logs = trainer.state.log_history
    for ours, log in zip(metrics["train"], [log for log in logs if "loss" in log], strict=True):
        assert ours["step"] == log["step"]
        assert ours["loss"] == pytest.approx(log["loss"], abs=1e-6)
        assert ours["learning_rate"] == pytest.approx(log["learning_rate"], abs=1e-12)
        assert ours["epoch"] == pytest.approx(log["epoch"], abs=1e-4)
    evaluations = [log["step"] for log in logs if "eval_loss" in log]
    assert [each["step"] for each in metrics["history"] if each["step"]] == evaluations
