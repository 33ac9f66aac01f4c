"""Tiny models with SparseGrad adapters of PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import sparsegrad_cli.peft as sg
from sparsegrad_cli.numerics.hosvd import Basis
from support.tiny_models import batch, classifier, orthogonal_bases, targets_of

ARCHITECTURES = ("bert", "llama", "gpt2")


@dataclass(frozen=True)
class Bases:
    """Bases as calibration returns them."""

    bases: dict[str, Basis]
    scores: dict[str, Tensor]

    def by_target(self) -> dict[str, Basis]:
        return self.bases


def bases_of(model: nn.Module, seed: int = 0) -> Bases:
    """Random orthogonal bases with descending singular values, one per target."""
    return Bases(orthogonal_bases(targets_of(model), seed=seed), {})


def wrapped(architecture: str, seed: int = 0, head: bool = True, **settings: Any) -> PeftModel:
    """A tiny classifier with a new adapter; with ``head``, its head trains too."""
    model = classifier(architecture)
    name = "classifier" if architecture == "bert" else "score"
    sizes = {"rank": 8} if settings.get("support") == "dense" else {"density": 0.05, "rank": 8}
    made = sg.SparseGradConfig(
        basis=bases_of(model, seed),
        modules_to_save=[name] if head else None,
        task_type="SEQ_CLS" if head else None,
        **(sizes | settings),
    )
    return get_peft_model(model, made)


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    """The model after some steps with the tuner's own optimizer."""
    optimizer = sg.optimizer(model, lr=1e-2)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
    return model.eval()
