"""TrainingArguments of a run: one process, one device, of a kind that the rest knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import training_args

from sparsegrad_cli.models.device import device_of
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.training.arguments import training_arguments
from sparsegrad_cli.training.callbacks import RecordCallback

RECIPE = Recipe.model_validate({"train": {"per_device_train_batch_size": 16}})


def test_no_device_that_only_transformers_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On Apple's silicon Trainer would move the model to "mps", and all else stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training_args, "is_torch_mps_available", lambda *_: True)
    arguments = training_arguments(RECIPE, tmp_path, "accuracy")
    assert arguments.device == device_of(RECIPE) == torch.device("cpu")


def test_two_gpus_are_not_one_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainer would wrap the model in nn.DataParallel and double the batch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    arguments = training_arguments(RECIPE, tmp_path, "accuracy")
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 16


def test_a_step_ends_when_the_gpu_has_done_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timer = RecordCallback(tmp_path, Observer(), [], "cuda:0").timer
    timer.start()
    timer.stop()
    assert waited == ["cuda:0", "cuda:0"]
