"""Several adapters, conversion to LoRA, and the ways in which other libraries load an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
)
from peft.utils import set_peft_model_state_dict
from support.peft_models import ARCHITECTURES, bases_of, trained, wrapped
from support.tiny_models import batch, classifier, logits

import sparsegrad_cli.peft as sg


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conversion_to_lora_keeps_the_outputs(architecture: str) -> None:
    model = trained(wrapped(architecture, head=False))
    config, tensors = convert_to_lora(model, 8)
    plain = get_peft_model(classifier(architecture), config)
    set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(logits(plain.eval()), logits(model), atol=2e-5, rtol=1e-4)


def test_two_adapters_switch_and_add_up() -> None:
    model = trained(wrapped("bert", head=False))
    first = logits(model)
    other = sg.SparseGradConfig(basis=bases_of(classifier("bert"), seed=1), density=0.05, rank=8)
    model.add_adapter("other", other)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    trained(model)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model.eval())
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model.eval()), both, atol=1e-5, rtol=1e-4)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), first)


@pytest.mark.parametrize("same_basis", [True, False])
def test_a_weighted_sum_of_adapters_is_the_sum_of_their_changes(same_basis: bool) -> None:
    model = trained(wrapped("llama", head=False))
    seed = 0 if same_basis else 3
    bases = bases_of(classifier("llama"), seed=seed)
    other = sg.SparseGradConfig(basis=bases, density=0.02, rank=8)
    model.add_adapter("other", other)
    model.set_adapter("other")
    trained(model)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for layer in model.modules():
        if isinstance(layer, sg.SparseGradLayer):
            expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
            found = layer.get_delta_weight("sum")
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            rank = layer.core_shape("sum")[0]
            assert rank == (8 if same_basis else 16)


def test_a_weighted_adapter_saves_and_loads(tmp_path: Path) -> None:
    model = trained(wrapped("bert", head=False))
    model.base_model.add_weighted_adapter(["default"], [0.5], "halved")
    model.set_adapter("halved")
    model.save_pretrained(tmp_path, selected_adapters=["halved"])
    again = PeftModel.from_pretrained(classifier("bert"), tmp_path / "halved")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_auto_peft_model_and_transformers_load_an_adapter(tmp_path: Path) -> None:
    base, saved = tmp_path / "base", classifier("bert")
    cast(Any, saved).save_pretrained(base)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base)
    made = sg.SparseGradConfig(basis=bases_of(model), density=0.05, rank=8, task_type="SEQ_CLS")
    tuned = trained(get_peft_model(model, made))
    tuned.save_pretrained(tmp_path / "adapter")
    expected = logits(tuned)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto.eval()), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain.eval()), expected)


def test_shared_bases_are_saved_once(tmp_path: Path) -> None:
    model = classifier("bert")
    bases = bases_of(model)
    names = list(bases.bases)
    kinds = {name.split(".", 4)[-1]: name for name in names}
    for name in names:
        bases.bases[name] = bases.bases[kinds[name.split(".", 4)[-1]]]
    made = sg.SparseGradConfig(basis=bases, density=0.05, rank=8, task_type="SEQ_CLS")
    tuned = trained(get_peft_model(model, made))
    tuned.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if key.endswith("q_out")]  # noqa: SIM118
    assert len(stored) == len(kinds)
    again = PeftModel.from_pretrained(classifier("bert"), tmp_path)
    assert torch.equal(logits(again.eval()), logits(tuned))


@pytest.mark.parametrize("support", ["dynamic", "refresh"])
def test_training_without_the_optimizer_is_refused(support: str) -> None:
    model = wrapped("bert", support=support).train()
    with pytest.raises(RuntimeError, match=r"call sparsegrad_cli\.peft\.optimizer"):
        model(**batch())
    sg.optimizer(model)
    model(**batch()).loss.backward()


def test_a_lora_adapter_beside_it_is_refused_by_peft() -> None:
    model = wrapped("bert")
    with pytest.raises(ValueError, match="different"):
        model.add_adapter("lora", LoraConfig(target_modules=["query"]))


def test_a_weighted_adapter_of_trained_heads_is_refused() -> None:
    model = wrapped("bert")
    other = sg.SparseGradConfig(
        basis=bases_of(classifier("bert")), density=0.05, modules_to_save=["classifier"]
    )
    model.add_adapter("other", other)
    with pytest.raises(ValueError, match=r"classifier besides \(modules_to_save\)"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    assert "mean" not in model.peft_config


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], [], "expected names of adapters, got none"),
        (["default", "default"], [1.0], "expected 2 weights, one each, got 1"),
        (["default"], [float("nan")], "expected finite numbers"),
    ],
)
def test_wrong_weights_are_refused(names: list[str], weights: list[float], message: str) -> None:
    model = wrapped("bert", head=False)
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(names, weights, "sum")
