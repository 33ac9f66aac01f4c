"""Cores and LoRA beside weights of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_models import (
    BITS,
    METHODS,
    PreparedModel,
    body_folder,
    frozen_tensors,
    loaded,
    need_bitsandbytes,
)
from support.tiny_models import batch, targets_of
from torch import nn

from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.quantized import find_quantized, quantization_state
from sparsegrad_cli.peft import SparseGradLayer

need_bitsandbytes()


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("bodies")
    return lambda architecture: body_folder(place / architecture, architecture)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_it_was_and_learns_beside_what_is_frozen(
    name: str, architecture: str, bits: str, body: Callable[[str], Path]
) -> None:
    one, other = (PreparedModel(body(architecture), bits, name) for _ in range(2))
    assert torch.equal(one.logits(), one.before)
    frozen = frozen_tensors(one.model)
    losses = one.steps(8)
    assert losses[-1] < 0.8 * losses[0]
    assert other.steps(8) == losses and torch.equal(one.logits(), other.logits())
    after = frozen_tensors(one.model)
    assert frozen.keys() == after.keys() and len(frozen) > 20
    assert all(torch.equal(frozen[key], after[key]) for key in frozen)
    kept = {n.rpartition(".")[2] for n, p in one.model.named_parameters() if p.requires_grad}
    assert kept <= {"default", "weight", "bias"}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_its_adapter_goes_onto_a_base_quantized_again(
    name: str, bits: str, body: Callable[[str], Path]
) -> None:
    trained, fresh = (PreparedModel(body("llama"), bits, name) for _ in range(2))
    trained.steps(3)
    tensors = trained.method.adapter_tensors(trained.model)
    packed = [n for n, t in tensors.items() if not t.is_floating_point() and "support" not in n]
    assert packed == []
    fresh.method.load_adapter(fresh.model, tensors)
    assert torch.equal(fresh.logits(), trained.logits())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_merged_weights_compute_the_same(name: str, bits: str, body: Callable[[str], Path]) -> None:
    trained = PreparedModel(body("llama"), bits, name)
    trained.steps(3)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for target in trained.targets:
        layer = trained.model.get_submodule(target.name)
        assert find_quantized(layer) is not None
        merged_OI = trained.method.merged_OI(trained.model, target)
        x_NI = x[:, : target.in_features]
        expected = x_NI.double() @ merged_OI.T
        torch.testing.assert_close(layer(x_NI).double(), expected, atol=1e-4, rtol=1e-4)
        factors = trained.method.factors(trained.model, target)
        delta_OI = merged_OI - target.weight_OI(trained.model).double()
        torch.testing.assert_close(factors.product_OI(), delta_OI, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_efficient_gated_mlps_work_with_recomputing(bits: str, body: Callable[[str], Path]) -> None:
    trained = PreparedModel(body("llama"), bits, "recomputed")
    mlp = trained.model.model.layers[1].mlp
    assert isinstance(mlp.up_proj, SparseGradLayer)
    assert "forward" in vars(mlp), "the module is run again in the backward pass"
    static = PreparedModel(body("llama"), bits, "static").model.model.layers[1].mlp
    assert vars(static)["forward"].func.__name__ == "_gated_mlp"


@pytest.mark.parametrize("bits", BITS)
def test_half_precision_leaves_the_core_in_float32(bits: str, body: Callable[[str], Path]) -> None:
    trained = PreparedModel(body("llama"), bits, "static", dtype="bfloat16")
    # The head becomes float32 where it trains.
    torch.testing.assert_close(trained.logits(), trained.before.float(), atol=2e-2, rtol=1e-2)
    losses = trained.steps(8)
    assert losses[-1] < 0.8 * losses[0]
    layer: Any = trained.model.get_submodule(trained.targets[0].name)
    assert layer.sparsegrad_values["default"].dtype == torch.float32
    assert layer.sparsegrad_q_out["default"].dtype == torch.bfloat16


def saved_and_alive(model: nn.Module) -> tuple[int, int]:
    """Bytes that autograd holds after a forward pass, and all that is alive but weights."""
    meter = MemoryMeter()
    bases = [b for n, b in model.named_buffers() if "sparsegrad_q_" in n]
    meter.watch(model, weights=quantization_state(model), bases=bases)
    with meter.phase("forward"):
        loss = model.train()(**batch(size=16, length=24)).loss
        live = meter.live()
    assert loss.requires_grad
    return live["saved_activations"], live["saved_activations"] + live["other"]


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_base_keeps_no_more_for_the_backward_pass(
    bits: str, body: Callable[[str], Path]
) -> None:
    """Than the plain one, whose core layers keep x Q_in alone; unseen by autograd or seen."""
    plain = saved_and_alive(PreparedModel(body("llama"), None, "static").model)
    packed = saved_and_alive(PreparedModel(body("llama"), bits, "static").model)
    assert packed[0] <= plain[0] and packed[1] <= plain[1]


def test_counts_are_of_entries_and_not_of_bytes(body: Callable[[str], Path]) -> None:
    plain = PreparedModel(body("bert"), None, "static").prepared.counts
    for bits in BITS:
        counts = PreparedModel(body("bert"), bits, "static").prepared.counts
        assert counts.model_parameters == plain.model_parameters
        assert counts.trainable_targets == plain.trainable_targets
    assert plain.targets[0].target.name == targets_of(loaded(body("bert"), "4bit"))[0].name
