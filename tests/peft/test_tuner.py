"""SparseGrad as a PEFT tuner: what plain PEFT does with any tuner works, on a BERT and a LLaMA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.peft_models import ARCHITECTURES, trained, wrapped
from support.tiny_models import classifier, logits

import sparsegrad_cli.peft as sg

SUPPORTS = ("static", "dense", "dynamic", "refresh")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_new_adapter_does_not_change_the_outputs(architecture: str, support: str) -> None:
    plain = logits(classifier(architecture).eval())
    assert torch.equal(logits(wrapped(architecture, support=support).eval()), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_saved_adapter_loads_bit_for_bit(architecture: str, support: str, tmp_path: Path) -> None:
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
