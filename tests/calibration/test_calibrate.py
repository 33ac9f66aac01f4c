"""Calibration: what it finds, and that the model comes out as it went in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.tiny_models import (
    BLOCKS,
    HIDDEN,
    INNER,
    Found,
    batch,
    batches,
    classifier,
    found_by,
    one_thread,
    targets_of,
    weight_of,
)
from torch import Tensor, nn

from sparsegrad_cli.calibration.diagnostics import spectra
from sparsegrad_cli.calibration.gradients import gradient_step, gradients_only
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import GramStream
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import CalibrationSection

DROPLESS: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def run(
    model: nn.Module,
    source: Iterator[dict[str, Tensor]] | None = None,
    *,
    steps: int = 3,
    basis_per: Literal["layer", "kind"] = "layer",
    seed: int = 0,
    **more: Any,
) -> tuple[Found, list[Target]]:
    targets = targets_of(model)
    settings = CalibrationSection(steps=steps, basis_per=basis_per)
    found = found_by(model, targets, lambda: source or batches(), settings, seed=seed, **more)
    return found, targets


def gram_of(found: Found, key: str) -> GramStream:
    stream = found.streams[key]
    assert isinstance(stream, GramStream)
    return stream


def random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return torch.get_rng_state().tolist(), name, keys.tolist(), *rest, random.getstate()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_grams_are_those_of_the_plain_gradients(architecture: str) -> None:
    """Against autograd on the untouched model, one backward pass a step."""
    off: dict[str, Any] = (
        DROPLESS
        if architecture == "bert"
        else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    )
    model = classifier(architecture, **off)
    found, targets = run(model, steps=4)
    expected = {t.name: torch.zeros(t.out_features, t.out_features) for t in targets}
    source = batches()
    for _ in range(4):
        model.zero_grad()
        model(**next(source)).loss.backward()
        for target in targets:
            grad = weight_of(model, target).grad
            assert isinstance(grad, Tensor)
            grad_OI = grad.T if target.transposed else grad
            expected[target.name] += grad_OI @ grad_OI.T
    for target in targets:
        stream = gram_of(found, target.name)
        assert stream.count == 4
        torch.testing.assert_close(
            stream.gram_out,
            expected[target.name],
            rtol=1e-4,
            atol=1e-6 * float(stream.gram_out.max()),
        )


def test_calibration_sees_dropout_and_is_seeded() -> None:
    model = classifier()
    first, _ = run(model, seed=1)
    again, _ = run(model, seed=1)
    other, _ = run(model, seed=2)
    assert first.losses == again.losses
    assert first.losses != other.losses
    for key, basis in first.bases.items():
        assert torch.equal(basis.q_out, again.bases[key].q_out)
        assert torch.equal(basis.q_in, again.bases[key].q_in)


def messy_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Mid-training: gradients held, some parameters frozen, modes mixed, optimizer state."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for number in range(2):
        optimizer.zero_grad()
        model(**batch(seed=number)).loss.backward()
        optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    for name in names[::3]:
        model.get_parameter(name).requires_grad_(False)
    for name in names[1::4]:
        model.get_parameter(name).grad = None
    model.get_submodule("bert.embeddings").eval()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that calibration has to leave alone, copied."""
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "ids": {n: id(p) for n, p in model.named_parameters()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "grad_ids": {n: id(p.grad) for n, p in model.named_parameters()},
        "wanted": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: len(p._post_accumulate_grad_hooks or {}) for n, p in model.named_parameters()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "random": random_state(),
    }


def assert_same(before: Any, after: Any, path: str = "") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), path
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before:
            assert_same(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), path
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            assert_same(a, b, f"{path}/{number}")
    else:
        assert before == after, path


def drawing_batches(fail_at: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Batches that draw from every generator, as an augmenting collator might."""
    number = 0
    while True:
        torch.rand(3)
        np.random.rand(3)
        random.random()
        if number == fail_at:
            raise OSError("the data file went away")
        yield batch(seed=number)
        number += 1


def test_the_model_comes_out_as_it_went_in() -> None:
    model, optimizer = messy_model()
    before = state_of(model, optimizer)
    run(model, drawing_batches())
    assert_same(before, state_of(model, optimizer))


def test_the_model_comes_out_as_it_went_in_when_a_batch_raises() -> None:
    model, optimizer = messy_model()
    before = state_of(model, optimizer)
    with pytest.raises(OSError, match="went away"):
        run(model, drawing_batches(fail_at=2), steps=4)
    assert_same(before, state_of(model, optimizer))


def test_the_model_comes_out_as_it_went_in_when_the_backward_pass_raises() -> None:
    model, optimizer = messy_model()

    def explode(grad: Tensor) -> Tensor:
        raise RuntimeError("no more memory")

    before = state_of(model, optimizer)

    def hooked() -> Iterator[dict[str, Tensor]]:
        yield batch()
        layer = model.get_submodule("bert.encoder.layer.1.output.dense")
        handles.append(
            layer.register_forward_hook(lambda m, i, o: o.register_hook(explode) and None)
        )
        yield batch(seed=1)

    handles: list[Any] = []
    with pytest.raises(RuntimeError, match="no more memory"):
        run(model, hooked())
    handles[0].remove()
    assert_same(before, state_of(model, optimizer))


def test_never_more_than_one_gradient_is_alive() -> None:
    model = classifier()
    targets = targets_of(model)
    names: list[str] = []

    def collect(target: Target, grad_OI: Tensor) -> None:
        names.append(target.name)
        assert grad_OI.shape == (target.out_features, target.in_features)
        assert [n for n, p in model.named_parameters() if p.grad is not None] == []

    with gradients_only(model, targets, collect):
        assert model.training
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert wanted == {f"{t.name}.weight" for t in targets}
        for number in range(2):
            gradient_step(model, batch(seed=number), number)
            assert all(p.grad is None for p in model.parameters())
    # backward meets the last layer first
    assert names == [t.name for t in reversed(targets)] * 2


def test_keys_per_layer_and_per_kind() -> None:
    model = classifier()
    layer, targets = run(model)
    assert layer.keys == {t.name: t.name for t in targets}
    kind, _ = run(model, basis_per="kind")
    assert kind.keys == {t.name: t.kind for t in targets}
    assert set(kind.bases) == {"intermediate.dense", "output.dense"}
    by_target = kind.by_target()
    assert by_target[targets[0].name] is by_target[targets[2].name]
    assert len(layer.by_target()) == 2 * BLOCKS


def test_kind_grams_are_the_sums_of_layer_grams() -> None:
    model = classifier()
    layer, targets = run(model)
    kind, _ = run(model, basis_per="kind")
    for name in kind.streams:
        stream = gram_of(kind, name)
        own = [gram_of(layer, t.name) for t in targets if t.kind == name]
        total = sum((s.gram_in for s in own), torch.zeros_like(stream.gram_in))
        scale = float(total.abs().max())
        torch.testing.assert_close(stream.gram_in, total, rtol=1e-4, atol=1e-6 * scale)
        assert stream.count == 3 * BLOCKS
    merged = layer.per_kind(targets)
    for name, basis in merged.items():
        torch.testing.assert_close(
            basis.singular_out, kind.bases[name].singular_out, rtol=1e-3, atol=1e-4
        )


def test_kind_bases_of_a_kind_calibration_count_each_stream_once() -> None:
    found, targets = run(classifier(), basis_per="kind")
    merged = found.per_kind(targets)
    for name, basis in merged.items():
        assert torch.equal(basis.q_out, found.bases[name].q_out)


@pytest.mark.parametrize("basis_per", ["layer", "kind"])
def test_bytes_of_the_streams_do_not_depend_on_steps(basis_per: Literal["layer", "kind"]) -> None:
    model = classifier()
    sizes = {run(model, steps=n, basis_per=basis_per)[0].stream_bytes for n in (1, 2, 9)}
    streams = 2 * BLOCKS if basis_per == "layer" else 2
    assert sizes == {streams * 4 * (HIDDEN**2 + INNER**2)}


def test_losses_and_progress_are_told() -> None:
    told: list[tuple[int, float]] = []
    found, _ = run(classifier(), on_step=lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == [1, 2, 3]
    assert [loss for _, loss in told] == found.losses
    assert found.seconds > 0


def test_two_steps_and_the_eigenvectors_are_metered() -> None:
    entered: list[int] = []

    @contextmanager
    def meter() -> Iterator[None]:
        entered.append(1)
        yield

    run(classifier(), steps=5, meter=meter)
    assert len(entered) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad: float) -> None:
    model, optimizer = messy_model()
    with torch.no_grad():
        model.get_parameter("classifier.bias").fill_(bad)
    before = state_of(model, optimizer)
    with pytest.raises(SparsegradError) as caught:
        run(model)
    assert "step 1" in caught.value.what
    assert caught.value.where == "calibration"
    for name in ("grads", "wanted", "modes", "random"):
        assert_same(before[name], state_of(model, optimizer)[name])


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = classifier()
    layer = model.get_submodule("bert.encoder.layer.1.output.dense")

    def overflow(module: nn.Module, grads: Any) -> Any:
        return (grads[0] * float("inf"),)

    layer.register_full_backward_pre_hook(overflow)
    with pytest.raises(SparsegradError) as caught:
        run(model)
    assert "not finite" in caught.value.what
    assert "bert.encoder.layer" in caught.value.what


def test_forked_random_seeds_inside_and_restores_outside_also_on_errors() -> None:
    before = random_state()
    drawn = []
    for _ in range(2):
        with temporary_seed(7):
            drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert drawn[0] == drawn[1]
    with pytest.raises(KeyError), temporary_seed(7):
        torch.rand(1)
        raise KeyError
    assert random_state() == before


def test_spectra_start_at_one_and_fall() -> None:
    found, _ = run(classifier(), basis_per="kind")
    rows = spectra(found.bases)
    assert [(row.key, row.side) for row in rows] == [
        (kind, side) for kind in ("intermediate.dense", "output.dense") for side in ("out", "in")
    ]
    for row in rows:
        assert row.values[0] == pytest.approx(1.0)
        values = [value for value in row.values if value is not None]
        assert row.values == sorted(values, reverse=True)
        assert len(row.values) in (HIDDEN, INNER)
