"""Grams over tokens, and the head's warm-up: against plain autograd, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny_models import (
    batch,
    batches,
    calibrated,
    classifier,
    one_thread,
    snapshot,
    targets_of,
    three_batches,
)
from torch import Tensor, nn

from sparsegrad_cli.calibration.gradients import tokens_only
from sparsegrad_cli.calibration.warmup import warmed_head
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.models.unpadding import use_unpadding
from sparsegrad_cli.numerics.hosvd import GramStream
from sparsegrad_cli.numerics.seeding import temporary_seed

DROPLESS: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_DROPLESS: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def pairs_by_autograd(
    model: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Target name -> (dL/dy, x) by retain_grad on the layers' outputs, all parameters open."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for target in targets_of(model):

        def hook(_: Any, args: Any, output: Tensor, name: str = target.name) -> None:
            output.retain_grad()
            kept[name] = (output, args[0])

        handles.append(model.get_submodule(target.name).register_forward_hook(hook))
    model.train()
    model(**inputs).loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return {name: (y.grad, x.detach()) for name, (y, x) in kept.items() if y.grad is not None}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("basis_per", ["layer", "kind"])
def test_grams_are_sums_over_tokens(architecture: str, basis_per: str) -> None:
    model = classifier(architecture, **(DROPLESS if architecture == "bert" else GPT2_DROPLESS))
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, basis_per=basis_per, source="token")
    expected: dict[str, list[Tensor]] = {}
    source = batches()
    for _ in range(2):
        pairs = pairs_by_autograd(model, next(source))
        for target in targets:
            g, x = (t.flatten(0, 1).double() for t in pairs[target.name])
            live = (g != 0).any(1)
            grams = [g.T @ g, x[live].T @ x[live]]
            key = target.name if basis_per == "layer" else target.kind
            sums = expected.setdefault(key, [torch.zeros_like(gram) for gram in grams])
            for total, gram in zip(sums, grams, strict=True):
                total += gram
    assert set(found.streams) == set(expected)
    for key, (gram_out, gram_in) in expected.items():
        stream = found.streams[key]
        assert isinstance(stream, GramStream)
        for got, wanted in ((stream.gram_out, gram_out), (stream.gram_in, gram_in)):
            tolerance = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=tolerance)


def test_padding_does_not_count() -> None:
    model = classifier(**DROPLESS)
    plain = batch()
    padded = {
        "input_ids": torch.nn.functional.pad(plain["input_ids"], (0, 5)),
        "attention_mask": torch.nn.functional.pad(plain["attention_mask"], (0, 5)),
        "labels": plain["labels"],
    }
    grams = []
    for inputs in (plain, padded):
        found = calibrated(
            model, targets_of(model), partial(iter, [inputs]), steps=1, source="token"
        )
        streams = found.streams.items()
        grams.append({key: s.gram_in for key, s in streams if isinstance(s, GramStream)})
    for key, gram in grams[0].items():
        torch.testing.assert_close(grams[1][key], gram, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind() -> None:
    model = classifier()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, random_state = snapshot(model), torch.get_rng_state()
    targets = targets_of(model)
    with pytest.raises(RuntimeError, match="stop"):

        def stop(*_: object) -> None:
            raise RuntimeError("stop")

        with tokens_only(model, targets, stop), temporary_seed(0):
            model(**batch()).loss.backward()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert not any(m._forward_hooks for m in model.modules())


def test_no_weight_gradient_is_formed() -> None:
    model = classifier()
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.append(any(p.grad is not None or p.requires_grad for p in model.parameters()))

    with tokens_only(model, targets_of(model), look):
        model(**batch()).loss.backward()
    assert seen == [False] * len(targets_of(model))


@pytest.mark.parametrize("keep", [False, True])
def test_the_head_is_warm_inside_and_as_the_recipe_says_outside(keep: bool) -> None:
    model = classifier()
    before, random_state = snapshot(model), torch.get_rng_state()
    heads = set(head_parameters(model))
    with torch.no_grad():
        cold = float(model(**batch(seed=3)).loss.detach())
    same = [batch(seed=3)]
    with warmed_head(model, lambda: same, steps=20, learning_rate=1e-2, seed=0, keep=keep):
        inside = snapshot(model)
        with torch.no_grad():
            assert float(model(**batch(seed=3)).loss.detach()) < cold
    after = snapshot(model)
    for name, value in before.items():
        assert torch.equal(inside[name], value) == (name not in heads)
        assert torch.equal(after[name], inside[name] if keep else value)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_of_half_precision_warms_in_float32(dtype: torch.dtype) -> None:
    """In float16 AdamW's eps is zero and small squares are: the head was nan after one step."""
    model, twin = classifier(**DROPLESS).to(dtype), classifier(**DROPLESS).to(dtype).float()
    cold = float(model(**batch(seed=3)).loss.detach())
    with (
        warmed_head(model, lambda: [batch(seed=3)], steps=20, learning_rate=1e-3, seed=0),
        warmed_head(twin, lambda: [batch(seed=3)], steps=20, learning_rate=1e-3, seed=0),
    ):
        warm = head_parameters(twin)
        for name, parameter in head_parameters(model).items():
            assert parameter.dtype == dtype
            assert torch.allclose(parameter.float(), warm[name], atol=3e-3)
        assert float(model(**batch(seed=3)).loss.detach()) < cold


def test_the_frozen_body_draws_no_dropout() -> None:
    heads = []
    for seed in (0, 1):
        model = classifier()
        with warmed_head(model, three_batches, steps=3, learning_rate=1e-2, seed=seed):
            heads.append({n: p.detach().clone() for n, p in head_parameters(model).items()})
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def test_the_body_runs_once_for_each_batch_of_the_warm_up() -> None:
    """Steps on kept outputs give the head that steps on the whole model give."""
    model, twin = classifier(**DROPLESS), classifier(**DROPLESS)
    body: Any = model.bert
    ran: list[int] = []
    use_unpadding(model)  # It has replaced the body's forward, and must be left there.
    before = body.forward
    body.embeddings.register_forward_hook(lambda *_: ran.append(1))
    given = three_batches()
    with warmed_head(model, lambda: given, steps=7, learning_rate=1e-2, seed=0):
        assert len(ran) == 3 and body.forward == before
        found = {n: p.detach().clone() for n, p in head_parameters(model).items()}
    head = head_parameters(twin)
    optimizer = torch.optim.AdamW(head.values(), lr=1e-2, weight_decay=0.0)
    for step in range(7):
        twin.eval()(**given[step % 3]).loss.backward()
        optimizer.step()
        twin.zero_grad()
    for name, parameter in head.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)


def test_a_failing_calibration_restores_the_head() -> None:
    model = classifier()
    before = snapshot(model)
    with (
        pytest.raises(RuntimeError, match="stop"),
        warmed_head(model, three_batches, steps=2, learning_rate=1e-2, seed=0),
    ):
        raise RuntimeError("stop")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_no_steps_no_warmth() -> None:
    model = classifier()
    before = snapshot(model)
    with warmed_head(model, list, steps=0, learning_rate=1e-2, seed=0, keep=True):
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
