"""The last optimizer step of an epoch weights its rows as one large batch does."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.chat_models import chat_model_folder
from support.cli_runs import Cli
from support.small_runs import base_folder
from torch import Tensor

ROWS = 10
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = (
    "method=full",
    "task.max_length=64",
    "train.num_train_epochs=1",
    "train.eval_strategy=no",
    "train.use_cpu=true",
    "train.logging_steps=1",
    # Far above every gradient: steps are in proportion to gradients, and hide no factor.
    "train.adam_epsilon=1e3",
    "train.learning_rate=1e3",
)


def write(path: Path, labels: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((f"text {n}" * 2, x) for n, x in enumerate(labels))])


def prepare(folder: Path, kind: str) -> tuple[str, ...]:
    """Write a model and ten rows of training data; return the overrides that name them."""
    if kind == "chat":
        chat_model_folder(folder / "base", positions=128)
        for name, count in (("train", ROWS), ("validation", 2)):
            rows = [{"prompt": f"{n}?", "completion": "yes " * (1 + n)} for n in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
        return ("model=base", "task=chat", "task.path=.")
    base_folder(folder / "base", **NO_DROPOUT)
    data = folder / "data"
    data.mkdir()
    labels = {
        "classes": ["neg"] * 8 + ["pos"] * 2,
        "scores": [f"{0.37 * n + 0.05:.2f}" for n in range(ROWS)],
    }[kind]
    write(data / "train.csv", labels)
    write(data / "validation.csv", [*labels[:3], *labels[-3:]])
    return ("model=base", "task=csv", "task.path=data")


def adapter(cli: Cli, run: str, size: int, micro_batches: int, *more: str) -> dict[str, Tensor]:
    """Train one epoch and return what changed."""
    outcome = cli(
        "train",
        *SETTINGS,
        *more,
        f"train.per_device_train_batch_size={size}",
        f"train.gradient_accumulation_steps={micro_batches}",
        "-q",
        "-o",
        run,
    )
    assert outcome.code == 0, outcome.err
    found: dict[str, Tensor] = load_file(f"{run}/adapter/adapter.safetensors")
    return found


@pytest.mark.parametrize("kind", ["classes", "scores", "chat"])
def test_unequal_micro_batches_give_the_step_of_one_batch(
    cli: Cli, tmp_path: Path, kind: str
) -> None:
    data = prepare(tmp_path, kind)
    whole = adapter(cli, "whole", ROWS, 1, *data)
    cut = adapter(cli, "cut", 4, 3, *data)
    assert any(bool(tensor.any()) for tensor in whole.values())
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-5)
    losses = [
        json.loads(Path(run, "run.json").read_text())["metrics"]["train"]
        for run in ("whole", "cut")
    ]
    assert len(losses[0]) == len(losses[1]) == 1
    assert losses[1][0]["loss"] == pytest.approx(losses[0][0]["loss"], rel=1e-4)


def test_step_with_fewer_micro_batches_weights_rows_equally(cli: Cli, tmp_path: Path) -> None:
    """Of ten rows, steps of 2 x 3 leave a step of 3 + 1, which equals batches of 6 and 4."""
    data = (*prepare(tmp_path, "classes"), "train.train_sampling_strategy=sequential")
    whole = adapter(cli, "whole", 6, 1, *data)
    cut = adapter(cli, "cut", 3, 2, *data)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-5)
