"""Adapters on 8-bit and 4-bit layers of bitsandbytes, loaded as a PEFT user loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.peft_models import bases_of, trained
from support.quantized_models import BITS, body_folder, need_bitsandbytes
from support.tiny_models import batch, logits
from torch import Tensor, nn

import sparsegrad_cli
import sparsegrad_cli.peft as sg
from sparsegrad_cli.models.quantized import dequantized, is_quantized

need_bitsandbytes()

Loader = Callable[[str | None], Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    folder = body_folder(tmp_path_factory.mktemp("body") / "llama", "llama")
    configs: dict[str | None, Any] = {
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        None: None,
    }

    def load(bits: str | None) -> Any:
        torch.manual_seed(1)  # draws the head
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, dtype=torch.float32, quantization_config=configs[bits]
        )
        model.config.pad_token_id = 0
        return model.eval()

    return load


def wrapped(model: nn.Module, support: str = "static") -> PeftModel:
    """Return a PEFT model whose head trains too."""
    config = sg.SparseGradConfig(
        basis=bases_of(model),
        density=0.05,
        rank=8,
        support=support,  # type: ignore[arg-type]
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, config)


def copied_to_plain(quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """Give a plain model the weights of the quantized one."""
    for name, layer in quantized.named_modules():
        if is_quantized(layer):
            outer: Any = plain.get_submodule(name.removesuffix(".base_layer"))
            outer.weight.data = dequantized(layer)
    return plain


def values_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    model(**batch(seed=5)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("support", ["static", "dynamic"])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_beside_the_dequantized_weights(
    bits: str, support: str, loaded: Loader
) -> None:
    model = loaded(bits)
    before = logits(model)
    adapted = wrapped(model, support)
    assert torch.equal(logits(adapted), before)
    sg.save_memory(adapted)  # bitsandbytes rounds the inputs of 8-bit layers by itself
    trained(adapted, steps=2)
    plain = wrapped(copied_to_plain(adapted.get_base_model(), loaded(None)), support)
    sg.optimizer(plain)
    state = {n: t for n, t in adapted.state_dict().items() if "sparsegrad" in n or "score" in n}
    assert plain.load_state_dict(state, strict=False).unexpected_keys == []
    torch.testing.assert_close(logits(adapted), logits(plain), atol=1e-4, rtol=1e-4)
    expected, got = values_and_gradients(plain), values_and_gradients(adapted)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_it_learns_and_loads_onto_a_base_quantized_again(
    bits: str, saving: bool, loaded: Loader, tmp_path: Path
) -> None:
    model = wrapped(loaded(bits))
    again = loaded(bits)
    if saving:
        sg.save_memory(model)
        sg.save_memory(again)
    optimizer, losses = sg.optimizer(model, lr=2e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(**batch(seed=5)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    loaded_again = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(logits(loaded_again), logits(model))


@pytest.mark.parametrize("bits", BITS)
def test_calibration_runs_on_quantized_weights(bits: str, loaded: Loader) -> None:
    model = loaded(bits)
    basis = sparsegrad_cli.calibrate(model, [batch(seed=n) for n in range(3)], rank=8)
    adapted = get_peft_model(model, sg.SparseGradConfig(basis=basis, density=0.05, rank=8))
    layers = [m for m in adapted.modules() if isinstance(m, sg.SparseGradLayer)]
    assert layers and all(is_quantized(layer.base_layer) for layer in layers)


@pytest.mark.parametrize("bits", BITS)
def test_merging_rounds_to_the_bits_of_the_base_and_says_so(bits: str, loaded: Loader) -> None:
    model = trained(wrapped(loaded(bits)))
    layer = next(m for m in model.modules() if isinstance(m, sg.SparseGradLayer))
    exact_OI = dequantized(layer.base_layer) + layer.get_delta_weight("default").detach()
    with pytest.warns(UserWarning, match="rounded"):
        model.merge_adapter()
    merged_OI = dequantized(layer.base_layer)
    error = float((merged_OI - exact_OI).abs().max() / exact_OI.abs().max())
    assert 0 < error < {"8bit": 0.01, "4bit": 0.2}[bits]
