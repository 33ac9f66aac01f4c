"""The task head of each architecture, by hand, and the fingerprint of the targets."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import ARCHITECTURES, build, classifier, config, targets_of
from torch import nn

from sparsegrad_cli.models.digests import fingerprint
from sparsegrad_cli.models.targets import head_parameters

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")},
    "electra": {f"classifier.{p}.{w}" for p in ("dense", "out_proj") for w in ("weight", "bias")},
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


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_fingerprint_tells_weights_apart(architecture: str) -> None:
    model = classifier(architecture)
    targets = targets_of(model)
    first = fingerprint(model, targets)
    assert len(first) == 64
    assert fingerprint(classifier(architecture), targets) == first
    assert fingerprint(classifier(architecture, seed=1), targets) != first
    for target in targets:
        changed = classifier(architecture)
        with torch.no_grad():
            target.weight_OI(changed)[2, 3] += 1e-4
        assert fingerprint(changed, targets) != first


def test_fingerprint_does_not_depend_on_the_head_or_what_is_no_target() -> None:
    model = classifier()
    targets = targets_of(model)
    first = fingerprint(model, targets)
    adapted = {f"{t.name}.weight" for t in targets}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in adapted:
                parameter.add_(1.0)
    assert fingerprint(model, targets) == first
    assert fingerprint(classifier(hidden_dropout_prob=0.5), targets) == first


def test_fingerprint_depends_on_which_targets() -> None:
    model = classifier()
    every = fingerprint(model, targets_of(model))
    assert fingerprint(model, targets_of(model, blocks="1:")) != every


def test_fingerprint_does_not_depend_on_requires_grad_or_mode() -> None:
    model = classifier()
    targets = targets_of(model)
    first = fingerprint(model, targets)
    model.train()
    model.requires_grad_(False)
    assert fingerprint(model, targets) == first


def test_fingerprint_of_a_large_layer_samples_it_evenly() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].up, model.layers[0].down = nn.Linear(64, 512), nn.Linear(512, 64)
    targets = targets_of(model)
    first = fingerprint(model, targets)
    with torch.no_grad():
        targets[0].weight_OI(model)[-1] += 1e-3
    assert fingerprint(model, targets) != first


def test_fingerprint_of_bfloat16_weights() -> None:
    model = classifier(dtype=torch.bfloat16)
    targets = targets_of(model)
    assert len(fingerprint(model, targets)) == 64
