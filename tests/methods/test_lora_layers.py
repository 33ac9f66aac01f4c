"""LoRA layers that keep their input once compute what peft's own layers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.tiny_models import batch, classifier, targets_of
from torch import Tensor, nn

from sparsegrad_cli.methods.lora.method import keep_inputs_once


def adapted(architecture: str, dropout: float, *, lean: bool, **config: Any) -> nn.Module:
    """A classifier in float64 with LoRA on its targets, every adapter away from zero."""
    torch.manual_seed(0)
    # Without dropout in the body, what differs between the two is the adapter's own.
    model = classifier(architecture, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = [target.name for target in targets_of(model)]
    config_ = LoraConfig(r=3, lora_alpha=5, target_modules=names, lora_dropout=dropout, **config)
    inject_adapter_in_model(config_, model)
    model.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double() / 10
    if lean:
        assert keep_inputs_once(model) == len(names)
    return model.train()


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on one batch, and the gradient of every parameter that has one."""
    torch.manual_seed(2)
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_loss_and_gradients_are_pefts(architecture: str, dropout: float) -> None:
    loss, gradients = loss_and_gradients(adapted(architecture, dropout, lean=False))
    found, found_gradients = loss_and_gradients(adapted(architecture, dropout, lean=True))
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    assert set(found_gradients) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-9, atol=1e-12 * float(gradient.abs().max())
        )


def test_rslora_scaling_is_kept() -> None:
    plain = adapted("bert", 0.0, lean=False, use_rslora=True)
    lean = adapted("bert", 0.0, lean=True, use_rslora=True)
    torch.testing.assert_close(loss_and_gradients(lean)[0], loss_and_gradients(plain)[0])


def test_a_disabled_or_merged_adapter_is_left_to_peft() -> None:
    model = adapted("bert", 0.0, lean=True)
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    with_adapter = model(**batch()).logits
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(**batch()).logits, with_adapter)
    for layer in layers:
        layer.unmerge()
        layer.enable_adapters(False)
    assert not torch.allclose(model(**batch()).logits, with_adapter)
