"""Causal language models: the same parts around a model whose head is its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from little import byte_tokenizer
from safetensors.torch import load_file
from tiny import batch, build, calibrated, config, targets_of
from torch import Tensor, nn

from sparsegrad_cli import load_adapter
from sparsegrad_cli.export.adapter import write_adapter
from sparsegrad_cli.export.lora import load_lora, lora_parts, write_lora
from sparsegrad_cli.export.plain import (
    auto_class,
    load_plain,
    merge,
    plain_model,
    task_settings,
    write_plain,
)
from sparsegrad_cli.export.rebuild import Trained
from sparsegrad_cli.methods.table import make_method
from sparsegrad_cli.modeling.targets import fingerprint
from sparsegrad_cli.numerics.hosvd import truncated
from sparsegrad_cli.recipe.method_section import LoraMethod, MepropMethod, SparsegradMethod
from sparsegrad_cli.recipe.schema import ModelSection, Recipe, TrainSection
from sparsegrad_cli.training.setup import Setup

METHODS: dict[str, Any] = {
    "core": SparsegradMethod(
        name="sparsegrad", density=0.05, form="core", support="static", rank=6
    ),
    "lora": LoraMethod(name="lora", rank=2),
    "meprop": MepropMethod(name="meprop", density=0.05),
}
CASES = [
    ("core", "llama", "head"),
    ("core", "gpt2", "rest"),
    ("lora", "llama", "rest"),
    ("meprop", "llama", "rest"),
]


def tokens(seed: int) -> dict[str, Tensor]:
    inputs = batch(seed=seed)
    return {**inputs, "labels": inputs["input_ids"]}


def make(folder: Path, name: str, architecture: str, scope: str) -> Trained:
    """A tiny causal model, its embeddings tied to its head, trained for a few steps."""
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    shape = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "tie_word_embeddings": True}
    plain: Any = build(AutoModelForCausalLM, config(architecture, **shape), seed=3)
    plain.generation_config.max_new_tokens = 9
    plain.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    targets = targets_of(model)
    method = make_method(METHODS[name])
    bases = None
    if method.needs_basis:

        def stream() -> Any:
            seed = 0
            while True:
                yield tokens(seed)
                seed += 1

        whole = calibrated(model, targets, stream, steps=2, basis_per="layer").by_target()
        bases = {name: truncated(basis, 6) for name, basis in whole.items()}
    mark = fingerprint(model, targets)
    method.prepare(model, targets, scope=scope, bases=bases)
    optimizer = method.optimizer(model, TrainSection(learning_rate=3e-2))
    for seed in range(5):
        optimizer.zero_grad()
        model.train()(**tokens(seed)).loss.backward()
        optimizer.step()
    nothing: Any = None
    setup = Setup(
        task=nothing,
        objective=nothing,
        train_data=nothing,
        validation={},
        tokenizer=tokenizer,
        collator=nothing,
        model=model.eval(),
        targets=targets,
        fingerprint=mark,
        head_hash="",
        device=torch.device("cpu"),
    )
    recipe = Recipe(model=ModelSection(name=str(folder)), method=METHODS[name], scope=scope, seed=1)
    adapter = method.adapter_tensors(model)
    keys = {t.name: t.name for t in targets} if bases else {}
    return Trained(recipe, setup, method, METHODS[name], True, adapter, bases or {}, keys)


def greedy(model: nn.Module) -> Tensor:
    inputs = batch(seed=9)
    out: Tensor = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False
    )
    return out


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = batch(seed=9)
    del inputs["labels"]
    found: Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize(("name", "architecture", "scope"), CASES)
def test_all_forms_continue_a_text_alike(
    name: str, architecture: str, scope: str, tmp_path: Path
) -> None:
    trained = make(tmp_path / "base", name, architecture, scope)
    auto = auto_class(trained.setup.model)
    assert auto == "AutoModelForCausalLM"
    expected, text = logits(trained.setup.model), greedy(trained.setup.model)
    assert float((logits(plain_model(trained)) - expected).abs().max()) > 0.1

    plain, _ = merge(trained)
    write_plain(plain, trained, tmp_path / "merged")
    merged: Any = load_plain(auto, tmp_path / "merged", trust_remote_code=False)
    assert merged.generation_config.max_new_tokens == 9
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied and "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")

    plain = plain_model(trained)
    rank = 16 if name == "meprop" else None
    parts = lora_parts(trained, plain, rank)
    head = {m for m in parts.modules if m.endswith(("lm_head", "embed_tokens", "wte"))}
    assert len(head) == (2 if scope == "rest" else 0), "tied weights are carried at both ends"
    write_lora(plain, parts, trained, tmp_path / "lora")
    settings = task_settings(trained.setup.model)
    lora = load_lora(auto, trained.recipe.model, settings, tmp_path / "lora")

    (tmp_path / "own").mkdir()
    write_adapter(trained, plain_model(trained), tmp_path / "own")
    own = load_adapter(tmp_path / "own")
    for model in (merged, lora, own):
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(greedy(model), text)
