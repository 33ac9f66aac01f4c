"""Causal language models: loaded whole or not at all, their MLPs found, their head left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BLOCKS, HIDDEN, INNER, batch, build, config, targets_of

from sparsegrad_cli.errors import FileFormatError, SparsegradError, UsageError
from sparsegrad_cli.models.load_model import load_causal_lm
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.schema import ModelSection

GATED = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# architecture -> the targets of a block and their (out, in), by hand
MLPS = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gpt2": {"mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)},
}


def saved(
    folder: Path, architecture: str, loader: str = "AutoModelForCausalLM", **more: Any
) -> Any:
    """A tiny random model in a folder, and the model."""
    import transformers

    model: Any = build(getattr(transformers, loader), config(architecture, **more), seed=3)
    model.save_pretrained(folder)
    return model


def section(name: Path, **more: Any) -> ModelSection:
    return ModelSection(name=str(name), **more)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", MLPS)
def test_what_was_saved_is_loaded(tmp_path: Path, architecture: str, tied: bool) -> None:
    original = saved(tmp_path, architecture, tie_word_embeddings=tied)
    model: Any = load_causal_lm(section(tmp_path))
    with torch.no_grad():
        ids = batch()["input_ids"]
        assert torch.equal(model(ids).logits, original(ids).logits)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is head) == tied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_recipes_dtype(tmp_path: Path, dtype: str) -> None:
    saved(tmp_path, "llama")
    model = load_causal_lm(section(tmp_path, dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("modules", ["auto", ("*",)])
@pytest.mark.parametrize("architecture", MLPS)
def test_targets_are_the_mlps_and_never_the_head(architecture: str, modules: Any) -> None:
    from transformers import AutoModelForCausalLM

    # A head as wide as the MLP and as high as the hidden width would look like one of its layers.
    model = build(AutoModelForCausalLM, config(architecture, vocab_size=INNER))
    targets = targets_of(model, modules=modules)
    assert not [t.name for t in targets if "head" in t.name or "embed" in t.name]
    if modules == "auto":
        found = [(t.block, t.kind, (t.out_features, t.in_features)) for t in targets]
        expected = MLPS[architecture].items()
        assert found == [(n, kind, shape) for n in range(BLOCKS) for kind, shape in expected]
    for target in targets:
        assert target.transposed == (architecture == "gpt2")
        assert target.weight_OI(model).shape == (target.out_features, target.in_features)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", MLPS)
def test_there_is_no_fresh_head(architecture: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = build(AutoModelForCausalLM, config(architecture, tie_word_embeddings=tied))
    assert head_parameters(model) == {}


def refused(folder: Path, kind: type[SparsegradError], *texts: str) -> None:
    with pytest.raises(kind) as caught:
        load_causal_lm(section(folder))
    assert caught.value.where == "model.name" and str(folder) in caught.value.what
    assert all(text in str(caught.value) for text in texts)


def test_a_body_without_its_head_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "AutoModel", tie_word_embeddings=False)
    refused(tmp_path, FileFormatError, "lacks lm_head.weight")


def test_a_tied_body_needs_no_head_of_its_own(tmp_path: Path) -> None:
    body = saved(tmp_path, "gpt2", "AutoModel")
    model: Any = load_causal_lm(section(tmp_path))
    assert torch.equal(model.lm_head.weight, body.wte.weight)


@pytest.mark.parametrize(
    ("architecture", "loader", "what"),
    [
        # BERT's own language-model head would load, and see the words that it is to predict.
        ("bert", "AutoModelForMaskedLM", "an encoder (bert)"),
        ("roberta", "AutoModel", "an encoder (roberta)"),
        ("distilbert", "AutoModel", "an encoder (distilbert)"),
        ("deberta-v3", "AutoModel", "an encoder (deberta-v2)"),
        ("t5", "AutoModelForSeq2SeqLM", "an encoder-decoder (t5)"),
    ],
)
def test_what_is_no_decoder_is_refused(
    tmp_path: Path, architecture: str, loader: str, what: str
) -> None:
    saved(tmp_path, architecture, loader)
    refused(tmp_path, UsageError, f"is {what}, and a chat task needs a causal language model")


def test_damaged_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(tmp_path, FileFormatError)
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, FileFormatError, "pytorch_model.bin only", "save_file")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, FileFormatError, "config.json")


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 67', '"vocab_size": 70'))
    refused(tmp_path, FileFormatError, "lm_head.weight", "model.embed_tokens.weight")
