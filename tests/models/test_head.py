"""The task head of each architecture, by hand."""

from __future__ import annotations

import pytest
from support.tiny_models import ARCHITECTURES, build, classifier, config, targets_of
from torch import nn

from sparsegrad_cli.models.targets import head_parameters

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")},
    "electra": {f"classifier.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")},
    "mpnet": {f"classifier.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")},
    "distilbert": {
        f"{p}.{w}" for p in ("pre_classifier", "classifier") for w in ("weight", "bias")
    },
    "deberta-v3": {f"{p}.{w}" for p in ("pooler.dense", "classifier") for w in ("weight", "bias")},
    "gpt2": {"score.weight"},
    "llama": {"score.weight"},
    "mistral": {"score.weight"},
    "qwen2": {"score.weight"},
    "qwen3": {"score.weight"},
    "gemma": {"score.weight"},
    "opt": {"score.weight"},
    "t5": {
        f"classification_head.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_of_a_classifier(architecture: str) -> None:
    model = classifier(architecture)
    head = head_parameters(model)
    assert set(head) == HEADS[architecture]
    named = dict(model.named_parameters())
    assert all(head[name] is named[name] for name in head)
    assert not set(head) & {f"{t.name}.weight" for t in targets_of(model)}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_language_model_has_no_head_of_its_own(architecture: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = build(AutoModelForCausalLM, config(architecture, tie_word_embeddings=tied))
    assert head_parameters(model) == {}


def test_a_bare_body_has_no_head() -> None:
    from transformers import BertModel

    assert head_parameters(build(BertModel, config("bert"))) == {}
    assert head_parameters(nn.Linear(2, 2)) == {}


def test_the_pooler_inside_the_body_is_not_the_head() -> None:
    model = classifier("bert")
    assert any("pooler" in name for name, _ in model.named_parameters())
    assert not any("pooler" in name for name in head_parameters(model))
