"""Penalties that PEFT leaves to the training loop, against formulas written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import KasaConfig, LoraConfig, MontecloraConfig, get_peft_model
from torch import Tensor, nn

from sparsegrad_cli.methods.peft_types.step_hooks import (
    add_gradient,
    draw_in_every_step,
    kasa_penalty,
    monteclora_penalty,
)


def adapted(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model: nn.Module = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def values(model: nn.Module, part: str) -> list[np.ndarray]:
    found = [p for name, p in model.named_parameters() if part in name]
    assert len(found) == 2
    return [p.detach().double().numpy() for p in found]


def test_kasa_penalty_is_its_formula() -> None:
    model = adapted(kasa_config=KasaConfig(beta=0.3, gamma=0.7))
    expected = 0.0
    parts = (values(model, part) for part in ("lora_A", "lora_B", "lora_diag"))
    for a, b, s in zip(*parts, strict=True):
        apart = np.sqrt(((b.T @ b - np.eye(2)) ** 2).sum())
        apart += np.sqrt(((a @ a.T - np.eye(2)) ** 2).sum())
        expected += 0.3 * (s**2).sum() + 0.7 * apart
    assert kasa_penalty(model, 0.3, 0.7).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_of_a_penalty_is_added_to_that_of_the_loss() -> None:
    """A finite difference of loss plus penalty, in float64."""
    model = adapted(kasa_config=KasaConfig(beta=0.3, gamma=0.7)).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    def total() -> Tensor:
        loss: Tensor = model(x).square().sum() + kasa_penalty(model, 0.3, 0.7)
        return loss

    model(x).square().sum().backward()
    add_gradient(model, lambda: kasa_penalty(model, 0.3, 0.7))
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        assert parameter.grad is not None
        with torch.no_grad():
            kept, step = parameter.flatten()[0].item(), 1e-6
            parameter.view(-1)[0] = kept + step
            above = total().item()
            parameter.view(-1)[0] = kept - step
            below = total().item()
            parameter.view(-1)[0] = kept
        difference = (above - below) / (2 * step)
        assert parameter.grad.view(-1)[0].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_monteclora_penalty_has_the_value_and_gradient_of_the_forward_pass() -> None:
    """PEFT's own loss needs the graph of the forward pass, before its backward pass frees it."""
    model = adapted(monteclora_config=MontecloraConfig())
    draw_in_every_step(model)
    model(torch.randn(4, 6))
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_monteclora_sampler")]
    samplers = [layer.lora_monteclora_sampler["default"] for layer in layers]
    assert len(samplers) == 2
    own = torch.stack([sum(s.get_variational_loss()) for s in samplers]).mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(own, trained, allow_unused=True)
    again = monteclora_penalty(model)
    found = torch.autograd.grad(again, trained, allow_unused=True)
    assert again.item() == pytest.approx(own.item(), rel=1e-6)
    assert sum(g is not None for g in expected) >= 4
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
