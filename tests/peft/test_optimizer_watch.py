"""Supports that the optimizer chooses: another optimizer in the loop is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_models import wrapped
from support.tiny_models import batch
from torch import nn
from transformers import Trainer, TrainingArguments

import sparsegrad_cli.peft as sg

CHOSEN = ("dynamic", "refresh")


class Rows(torch.utils.data.Dataset[Any]):
    """Single rows of the tiny models' batches."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {key: value[0] for key, value in batch(seed=number).items()}


def train_by_trainer(model: nn.Module, folder: Path, optimizer: Any, **settings: Any) -> None:
    said = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        **settings,
    )
    Trainer(model, said, train_dataset=Rows(), optimizers=(optimizer, None)).train()


@pytest.mark.parametrize("support", CHOSEN)
def test_trainer_with_its_own_optimizer_is_stopped(support: str, tmp_path: Path) -> None:
    model = wrapped("bert", support=support)
    sg.optimizer(model, lr=1e-2)
    with pytest.raises(RuntimeError, match=r"something else than sparsegrad_cli.peft.optimizer"):
        train_by_trainer(model, tmp_path, None)


@pytest.mark.parametrize("support", CHOSEN)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_trainer_with_our_optimizer_trains(
    support: str, micro_batches: int, tmp_path: Path
) -> None:
    model = wrapped("bert", support=support)
    optimizer = sg.optimizer(model, lr=1e-2)
    train_by_trainer(model, tmp_path, optimizer, gradient_accumulation_steps=micro_batches)
    assert all(values.abs().sum() > 0 for values in values_of(model))


def values_of(model: nn.Module) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if "sparsegrad_values" in n]


def test_an_optimizer_that_writes_to_data_is_noticed_too() -> None:
    """Such as those of bitsandbytes, which change no version counter."""
    model = wrapped("llama", support="dynamic").train()
    sg.optimizer(model, lr=1e-2)
    model(**batch()).loss.backward()
    for values in values_of(model):
        assert values.grad is not None
        values.data.sub_(values.grad)
    with pytest.raises(RuntimeError, match="give its result to the training loop"):
        model(**batch())


def test_steps_that_are_left_out_and_loaded_weights_are_not_taken_for_it() -> None:
    model = wrapped("llama", support="dynamic").train()
    optimizer = sg.optimizer(model, lr=1e-2)
    for _ in range(2):  # as a gradient scaler leaves out a step whose gradients overflow
        model(**batch()).loss.backward()
        optimizer.zero_grad()
    model(**batch()).loss.backward()
    optimizer.step()
    state = {n: t + 1 for n, t in model.state_dict().items() if "sparsegrad_values" in n}
    model.load_state_dict(state, strict=False)
    optimizer.zero_grad()
    model(**batch()).loss.backward()
    optimizer.step()


def test_a_second_optimizer_of_ours_takes_the_place_of_the_first() -> None:
    model = wrapped("llama", support="dynamic").train()
    for optimizer in (sg.optimizer(model, lr=1e-2), sg.optimizer(model, lr=1e-3)):
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()


def test_a_deleted_adapter_is_watched_no_more() -> None:
    model = wrapped("llama", support="dynamic").train()
    sg.optimizer(model, lr=1e-2)
    model(**batch()).loss.backward()
    model.delete_adapter("default")
    layers = [module for module in model.modules() if isinstance(module, sg.SparseGradLayer)]
    assert layers and not any(layer.unused_gradient for layer in layers)


def test_parameters_that_were_replaced_after_the_optimizer_was_made_are_refused() -> None:
    """accelerate does so when it splits a model by FSDP2."""
    model = wrapped("llama", support="dynamic").train()
    optimizer = sg.optimizer(model, lr=1e-2)
    model(**batch()).loss.backward()
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(RuntimeError, match="replaced after it was made"):
        optimizer.step()
