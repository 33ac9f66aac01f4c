"""Digests do not change between versions, and tell weights apart."""

from __future__ import annotations

import hashlib

import pytest
import torch
from support.tiny_models import classifier, targets_of
from torch import nn

from sparsegrad_cli.models.digests import (
    body_digest,
    fingerprint,
    parameters_digest,
    tensors_digest,
    weights_digest,
)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_digests_of_tensors_and_parameters_by_hand() -> None:
    tensors = {
        "b": torch.tensor([[1.0, -2.0]]),
        "a": torch.tensor([1.0], dtype=torch.bfloat16),
        "c": torch.empty(0, dtype=torch.int32),
    }
    floats = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1 and -2, little endian.
    assert tensors_digest(tensors.items()) == sha256(
        b"b (1, 2) torch.float32",
        floats,
        b"a (1,) torch.bfloat16",
        b"\x80\x3f",
        b"c (0,) torch.int32",
    )
    parameters = {name: nn.Parameter(tensors[name]) for name in ("b", "a")}
    assert parameters_digest(parameters) == sha256(b"a", floats[:4], b"b", floats)


def test_digest_of_weights_covers_buffers() -> None:
    model = nn.BatchNorm1d(2)
    before = weights_digest(model)
    assert before == weights_digest(nn.BatchNorm1d(2))
    assert model.running_mean is not None
    model.running_mean += 1
    assert weights_digest(model) != before


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


def test_the_digest_of_the_body_depends_on_all_weights_but_the_head() -> None:
    model, same = classifier(), classifier()
    before = body_digest(model)
    assert body_digest(same) == before
    with torch.no_grad():
        same.get_parameter("classifier.weight").add_(1)
    assert body_digest(same) == before
    with torch.no_grad():
        same.get_parameter("bert.embeddings.LayerNorm.bias")[0] += 1
    assert body_digest(same) != before
