"""SparseGrad as a PEFT tuner: what plain PEFT does with any tuner works, on a BERT and a LLaMA."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from support.tiny_models import batch, build, classifier, config, logits, orthogonal_bases, targets_of
from torch import Tensor, nn

import sparsegrad_cli.peft as sg
from sparsegrad_cli.numerics.hosvd import Basis

ARCHITECTURES = ("bert", "llama", "gpt2")
SUPPORTS = ("static", "dense", "dynamic", "refresh")


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


def wrapped(architecture: str, seed: int = 0, **settings: Any) -> PeftModel:
    """A tiny classifier with a fresh adapter; its head trains."""
    model = classifier(architecture)
    head = "classifier" if architecture == "bert" else "score"
    made = sg.SparseGradConfig(
        basis=bases_of(model, seed),
        modules_to_save=[head],
        task_type="SEQ_CLS",
        **{"density": 0.05, "rank": 8, **settings},
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_new_adapter_does_not_change_the_outputs(architecture: str, support: str) -> None:
    plain = logits(classifier(architecture).eval())
    assert torch.equal(logits(wrapped(architecture, support=support).eval()), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_saved_adapter_loads_bit_for_bit(
    architecture: str, support: str, tmp_path: Path
) -> None:
    model = trained(wrapped(architecture, support=support))
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    again = PeftModel.from_pretrained(classifier(architecture), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SPARSEGRAD" and "basis" not in saved


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_merging_gives_the_same_outputs(architecture: str, support: str) -> None:
    model = trained(wrapped(architecture, support=support))
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    plain = model.merge_and_unload()
    assert not [m for m in plain.modules() if isinstance(m, sg.SparseGradLayer)]
    torch.testing.assert_close(logits(plain), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabling_gives_the_base_model(architecture: str) -> None:
    model = trained(wrapped(architecture))
    body = model.get_base_model()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier(architecture).eval()))
    assert body is model.get_base_model()
    assert not torch.equal(logits(model), logits(classifier(architecture).eval()))
