"""Which layers are held in few bits, what they stand for, and what their products keep."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_models import (
    BINARY_TASK,
    BITS,
    body_folder,
    loaded,
    need_bitsandbytes,
    section,
)
from support.tiny_models import BLOCKS, HIDDEN, INNER, batch, targets_of
from torch import Tensor

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.digests import fingerprint, parameters_digest
from sparsegrad_cli.models.load_model import load_causal_lm, load_classifier
from sparsegrad_cli.models.quantized import (
    count_entries,
    dequantized,
    dtype_of,
    is_quantized,
    quantization_state,
    quantized_layers,
)
from sparsegrad_cli.models.targets import head_parameters, is_linear

need_bitsandbytes()
ARCHITECTURES = ("llama", "bert", "gpt2")


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("bodies")
    return lambda architecture: body_folder(place / architecture, architecture)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_of_blocks_and_no_other(
    architecture: str, bits: str, body: Callable[[str], Path]
) -> None:
    model, plain = loaded(body(architecture), bits), loaded(body(architecture), None)
    packed = quantized_layers(model)
    for name, module in plain.named_modules():
        if is_linear(module):
            inside = any(part.isdigit() for part in name.split("."))
            assert (name in packed) == inside, name
    assert all(p.dtype == torch.float32 for p in head_parameters(model).values())
    assert parameters_digest(head_parameters(model)) == parameters_digest(head_parameters(plain))
    assert count_entries(model) == count_entries(plain)
    # The same targets of the same shapes, though GPT-2's plain ones hold W'.
    sides = [(t.name, t.out_features, t.in_features) for t in targets_of(plain)]
    assert [(t.name, t.out_features, t.in_features) for t in targets_of(model)] == sides
    assert not any(t.transposed for t in targets_of(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_what_a_layer_stands_for_is_what_it_multiplies_by(
    bits: str, dtype: str, body: Callable[[str], Path]
) -> None:
    """A row of the identity picks a column of W; both directions of a product agree on it."""
    model, plain = loaded(body("llama"), bits, dtype), loaded(body("llama"), None)
    for target in targets_of(model):
        layer = model.get_submodule(target.name)
        weight_OI = target.weight_OI(model)
        assert is_quantized(layer) and weight_OI.dtype == dtype_of(layer) == getattr(torch, dtype)
        assert weight_OI.shape == (target.out_features, target.in_features)
        x = torch.eye(target.in_features, dtype=weight_OI.dtype, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, weight_OI.T)
        (dx,) = torch.autograd.grad(y, x, torch.eye(target.in_features, target.out_features).to(y))
        some = min(target.in_features, target.out_features)
        assert torch.equal(dx[:some], weight_OI[:some])
        original = target.weight_OI(plain)
        error = (weight_OI.float() - original).norm() / original.norm()
        assert 1e-3 < error < (0.02 if bits == "8bit" else 0.12)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_four_bits_are_taken_apart_by_their_formula(
    architecture: str, body: Callable[[str], Path]
) -> None:
    """NF4 of Dettmers et al. 2023: code[nibble] x scale of its 64 entries, wherever rows end."""
    for layer in quantized_layers(loaded(body(architecture), "4bit")).values():
        weight: Any = layer.weight
        state = weight.quant_state
        packed = weight.data.view(-1).long()
        nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1)
        of_scales = state.state2
        scales = of_scales.code[state.absmax.long()] * of_scales.absmax[0] + state.offset
        assert len(of_scales.absmax) == 1, "a block of scales is 256 of them"
        expected = state.code[nibbles] * scales.repeat_interleave(64)[: len(nibbles)]
        torch.testing.assert_close(dequantized(layer).view(-1), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_training_and_evaluation_compute_the_same(
    bits: str, body: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(body("llama"), bits)
    with torch.no_grad():
        evaluated = model.eval()(**batch()).logits
        assert torch.equal(model.train()(**batch()).logits, evaluated)
    assert "cast" not in caplog.text


def still_alive(layer: Any, count: int = 8) -> bool:
    """Whether x outlives the forward pass of a layer."""
    x = torch.ones(count, layer.in_features, requires_grad=True) * 2.0  # of which nothing is kept
    storage = weakref.ref(x.untyped_storage())
    y = layer(x)
    del x
    gc.collect()
    alive = storage() is not None
    y.sum().backward()
    return alive


def test_no_layer_keeps_its_input(body: Callable[[str], Path]) -> None:
    """bitsandbytes' own 8-bit layer does, though its weight is frozen."""
    for bits in BITS:
        model = loaded(body("llama"), bits).train()
        layer = model.model.layers[0].mlp.down_proj
        assert not still_alive(layer)
        del layer.forward  # bitsandbytes' own again
        assert still_alive(layer) == (bits == "8bit")


@pytest.mark.parametrize("bits", BITS)
def test_fingerprints_tell_weights_apart(bits: str, body: Callable[[str], Path]) -> None:
    model = loaded(body("llama"), bits)
    targets = targets_of(model)
    mark = fingerprint(model, targets)
    again, plain = loaded(body("llama"), bits), loaded(body("llama"), None)
    assert fingerprint(again, targets) == mark != fingerprint(plain, targets)
    with torch.no_grad():
        again.get_submodule(targets[3].name).weight.view(-1)[5] += 1
    assert fingerprint(again, targets) != mark


@pytest.mark.parametrize("bits", BITS)
def test_weights_and_scales_are_counted_as_weights(bits: str, body: Callable[[str], Path]) -> None:
    model = loaded(body("llama"), bits)
    meter = MemoryMeter()
    meter.watch(model, weights=quantization_state(model))
    with meter.phase("load"):
        pass
    peak = meter.peak("load")
    assert peak is not None
    layers: list[Any] = list(quantized_layers(model).values())
    packed = sum(layer.weight.numel() for layer in layers)
    entries = sum(dequantized(layer).numel() for layer in layers)
    assert packed == (entries if bits == "8bit" else entries // 2)
    rest = [p for p in model.parameters() if p.is_floating_point()] + list(model.buffers())
    plain = sum({t.untyped_storage().data_ptr(): t.nbytes for t in rest}.values())
    scales = sum(t.nbytes for t in quantization_state(model))
    assert peak.categories["weights"] == plain + packed + scales
    # One scale a row of float32; or one byte for 64 entries, and code books.
    rows = {HIDDEN: 3, INNER: 2}  # q, o, down; gate, up. k and v have one head of eight
    if bits == "8bit":
        assert scales == 4 * BLOCKS * (sum(n * rows[n] for n in rows) + 2 * 8)
    else:
        assert scales >= entries // 64


def test_a_missing_library_is_named(
    body: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError) as caught:
        load_classifier(section(body("llama"), "4bit"), BINARY_TASK, seed=0)
    assert caught.value.where == "model.quantization"
    assert "pip install 'bitsandbytes" in str(caught.value.fix)
    assert quantized_layers(loaded(body("llama"), None)) == {}


@pytest.mark.parametrize("bits", [None, "4bit"])
def test_weights_that_are_packed_already_are_refused(
    bits: str | None, body: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded(body("llama"), "4bit").save_pretrained(tmp_path / "packed")
    with pytest.raises(UsageError, match="quantized already"):
        load_classifier(section(tmp_path / "packed", bits), BINARY_TASK, seed=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_head_is_left_alone(tied: bool, bits: str, tmp_path: Path) -> None:
    from support.tiny_models import build, config
    from transformers import AutoModelForCausalLM

    original: Any = build(AutoModelForCausalLM, config("llama", tie_word_embeddings=tied), seed=3)
    original.save_pretrained(tmp_path / "lm")
    model: Any = load_causal_lm(section(tmp_path / "lm", bits))
    head: Tensor = model.get_output_embeddings().weight
    assert torch.equal(head, original.get_output_embeddings().weight)
    assert (head is model.get_input_embeddings().weight) == tied
    assert len(quantized_layers(model)) == 7 * BLOCKS
