"""Methods on mixtures of experts and on fused layers: what trains is what the record says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.architectures import TABLE, causal_or_body, tokens
from support.tiny_models import METHODS, calibrated, targets_of
from torch import nn

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.methods.implementation import Prepared, check_what_trains
from sparsegrad_cli.methods.lora.method import Lora
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.peft_folder import check_adapted
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import TrainSection

ALL = ("lora", "full", "meprop-entries", "meprop-rows", "core-static", "materialized-layer")


def prepared(name: str, architecture: str, scope: str) -> tuple[nn.Module, Any, Prepared]:
    model_type, settings, *_ = TABLE[architecture]
    model = causal_or_body(model_type, settings)
    targets = targets_of(model)
    chosen, basis_per = METHODS[name]
    bases = None
    if basis_per:
        found = calibrated(model, targets, lambda: iter([tokens()] * 2), steps=2, rank=None)
        bases = found.by_target()
    method: Any = chosen.implementation()
    with temporary_seed(0):
        return model, method, method.prepare(model, targets, scope=scope, bases=bases)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe", "deepseek_v3", "phi3", "glm4"])
@pytest.mark.parametrize("name", ALL)
def test_what_trains_is_what_is_counted_and_merges(name: str, architecture: str) -> None:
    model, method, ready = prepared(name, architecture, "head")
    check_what_trains(model, ready.counts)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = method.optimizer(model, TrainSection(learning_rate=1e-2))
    for seed in range(2):
        optimizer.zero_grad()
        model(**tokens(seed=seed)).loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    names = [count.target.name for count in ready.counts.targets]
    assert all(any(m.startswith(f"{name}.") for m in moved) for name in names)
    assert all(any(m.startswith(f"{name}.") for name in names) for m in moved)
    plain = causal_or_body(*TABLE[architecture][:2])
    with torch.no_grad():
        for count in ready.counts.targets:
            merged_OI = method.merged_OI(model, count.target)
            count.target.in_model(plain).weight_OI(plain).copy_(merged_OI)
        inputs = tokens(seed=9)
        expected, got = model.eval()(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_scope_rest_trains_experts_and_counts_them(name: str) -> None:
    model, _, ready = prepared(name, "qwen3_moe", "rest")
    check_what_trains(model, ready.counts)
    experts = [p for n, p in model.named_parameters() if "experts" in n]
    assert all(p.requires_grad for p in experts)
    assert ready.counts.trainable_rest > sum(p.numel() for p in experts)


def test_lora_adapts_the_dense_layers_and_not_the_experts() -> None:
    """peft 0.21.2 rewrites gate_proj, up_proj and down_proj to the experts' parameters."""
    model, _, ready = prepared("lora", "qwen3_moe", "head")
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0] for n in trained} == {
        f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")
    }
    assert sum(trained.values()) == ready.counts.trainable_targets == 3 * 2 * (72 + 32)


def test_up_and_down_alone_can_be_adapted() -> None:
    """By names in target_modules, peft refuses up without gate."""
    model = causal_or_body(*TABLE["qwen3_moe"][:2])
    targets = targets_of(model, modules=("*.mlp.up_proj", "*.mlp.down_proj"))
    ready = Lora(LoraSettings(name="lora", rank=2)).prepare(model, targets, scope="head")
    check_what_trains(model, ready.counts)
    assert [c.entries for c in ready.counts.targets] == [2 * (72 + 32)] * 2


def test_another_set_of_adapted_modules_is_refused() -> None:
    model, _, ready = prepared("lora", "llama", "head")
    names = [count.target.name for count in ready.counts.targets]
    check_adapted(model, names, "nothing")
    extra = r"adapted model\.layers\.1\.mlp\.down_proj, which is not a target"
    with pytest.raises(SparsegradError, match=extra):
        check_adapted(model, names[:-1], "nothing")
    with pytest.raises(SparsegradError, match=r"left out model\.embed_tokens, which is a target"):
        check_adapted(model, [*names, "model.embed_tokens"], "nothing")


def test_parameters_beside_the_counted_ones_are_refused() -> None:
    model, _, ready = prepared("full", "qwen3_moe", "head")
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    experts.requires_grad_(True)
    with pytest.raises(SparsegradError, match=r"expected 0 parameters .* but 3,072 do \(among"):
        check_what_trains(model, ready.counts)
    experts.requires_grad_(False)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    with pytest.raises(SparsegradError, match=r"2,304 parameters of \S+up_proj to train, but 0 do"):
        check_what_trains(model, ready.counts)
