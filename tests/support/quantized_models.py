"""Tiny models whose blocks bitsandbytes quantizes to 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.memory_savers import save_memory
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import ModelSection, TrainSection
from sparsegrad_cli.recipe.tasks import TaskSpec
from support.tiny_models import batch, batches, build, calibrated, config, targets_of

WHY = "bitsandbytes is not installed"
BITS = ("8bit", "4bit")
BINARY_TASK = TaskSpec("t", ("text",), "label", ("no", "yes"), False, "accuracy", ("accuracy",))


def core_settings(support: Any, **more: Any) -> SparsegradSettings:
    """Return settings of a core of rank 7."""
    return SparsegradSettings(name="sparsegrad", density=0.05, rank=7, support=support, **more)


METHODS: dict[str, Any] = {
    "static": core_settings("static"),
    "dynamic": core_settings("dynamic"),
    "dense": core_settings("dense"),
    "recomputed": core_settings("refresh", refresh_steps=2, recompute="activation"),
    "lora": LoraSettings(name="lora", rank=3),
}


def need_bitsandbytes() -> None:
    """Skip all tests of a module if the library is missing."""
    pytest.importorskip("bitsandbytes", reason=WHY)
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from transformers.utils import is_bitsandbytes_available

    # They cache their first answer, which must not come from a test that hides the library.
    assert is_bnb_available() and is_bnb_4bit_available() and is_bitsandbytes_available()


def body_folder(folder: Path, architecture: str) -> Path:
    """Return a folder with a random body, made on first use."""
    from transformers import AutoModel

    if not folder.is_dir():
        # At transformers' 0.02 a tiny model's logits are so small that nothing would matter.
        settings = config(architecture, initializer_range=0.3)
        model: Any = build(AutoModel, settings, seed=3)
        model.save_pretrained(folder)
    return folder


def section(folder: Path, bits: str | None, dtype: Any = "float32") -> ModelSection:
    """Return the model section of a recipe."""
    return ModelSection(name=str(folder), quantization=bits, dtype=dtype)  # type: ignore[arg-type]


def loaded(folder: Path, bits: str | None, dtype: Any = "float32") -> Any:
    """Load a classifier with two labels on the body of a folder, in eval mode."""
    model: Any = load_classifier(section(folder, bits, dtype), BINARY_TASK, seed=1).model
    model.config.pad_token_id = 0
    return model.eval()


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all frozen parameters and of the scales of quantized ones."""
    from sparsegrad_cli.models.quantized import quantization_state

    found = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    scales = enumerate(quantization_state(model))
    return found | {f"scale {number}": tensor.clone() for number, tensor in scales}


class PreparedModel:
    """A quantized classifier prepared by a method, with its optimizer."""

    def __init__(self, folder: Path, bits: str | None, name: str, dtype: Any = "float32") -> None:
        self.model = loaded(folder, bits, dtype)
        self.before = self.logits()
        self.targets = targets_of(self.model)
        save_memory(self.model, self.targets, METHODS[name].recompute)
        self.method: Any = METHODS[name].implementation()
        bases = None
        if METHODS[name].calibrates:
            found = calibrated(
                self.model, self.targets, batches, steps=3, source="token", rank=7, seed=0
            )
            bases = found.by_target()
        with temporary_seed(0):
            self.prepared = self.method.prepare(self.model, self.targets, scope="head", bases=bases)
        self.optimizer = self.method.optimizer(self.model, TrainSection(learning_rate=2e-2))

    def logits(self) -> Tensor:
        """Return logits of one batch, in eval mode."""
        with torch.no_grad():
            found: Tensor = self.model.eval()(**batch(seed=7)).logits
        return found

    def steps(self, count: int) -> list[float]:
        """Train on one batch, and return the loss before each step."""
        losses = []
        with temporary_seed(0):
            for _ in range(count):
                self.optimizer.zero_grad()
                loss = self.model.train()(**batch(seed=5)).loss
                loss.backward()
                self.optimizer.step()
                losses.append(float(loss.detach()))
        return losses
