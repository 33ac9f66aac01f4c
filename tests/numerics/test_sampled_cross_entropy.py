"""Cross-entropy over a sample of the classes equals a loop over explicit sets; its sets and costs.

The reference is written from the definitions of arXiv 2409.18721 and 2408.02354, in float64 with
torch's own autograd, one position at a time.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.numerics.linear_cross_entropy import linear_cross_entropy
from sparsegrad_cli.numerics.sampled_cross_entropy import (
    ClassSets,
    rece_sets,
    sampled_cross_entropy,
    sce_sets,
)
from sparsegrad_cli.numerics.seeding import generator_of

N, V, I = 23, 41, 5  # noqa: E741


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, bias and target."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, I, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, I, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=generator)


def sets_of(name: str, hidden: Tensor, weight: Tensor) -> ClassSets:
    """Return one of several choices of sets."""
    draw = generator_of(7)
    choices: dict[str, Any] = {
        "sce": lambda: sce_sets(hidden, weight, draw, classes=6),
        "sce, few positions": lambda: sce_sets(
            hidden, weight, draw, buckets=3, positions=4, classes=9, mix=False
        ),
        "rece": lambda: rece_sets(hidden, weight, draw),
        "rece, no neighbours": lambda: rece_sets(hidden, weight, draw, chunks=4, neighbours=0),
        "rece, rounds": lambda: rece_sets(hidden, weight, draw, chunks=5, rounds=3),
    }
    found: ClassSets = choices[name]()
    return found


def reference(
    z_NV: Tensor, target: Tensor, sets: ClassSets, *, largest: bool
) -> tuple[Tensor, int]:
    """Return N times the mean loss, and how many positions count."""
    losses = []
    for row in range(len(z_NV)):
        found = [
            set(classes.tolist()) - {int(target[row])}
            for rows, classes in zip(sets.rows, sets.classes, strict=True)
            if row in rows.tolist()
        ]
        if not found:
            continue
        own = z_NV[row, target[row]]
        joined = found if largest else [set().union(*found)]
        each = [torch.cat([own[None], z_NV[row, sorted(s)]]).logsumexp(0) - own for s in joined]
        losses.append(torch.stack(each).max())
    return torch.stack(losses).mean() * len(z_NV), len(losses)


SETS = ["sce", "sce, few positions", "rece", "rece, no neighbours", "rece, rounds"]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("scale", "cap", "dtype", "tolerance"),
    [
        (1.0, None, torch.float64, 1e-12),
        (0.25, None, torch.float64, 1e-12),
        (1.5, 3.0, torch.float64, 1e-12),
        (1.5, 3.0, torch.float32, 3e-5),
    ],
)
def test_value_and_gradients(
    name: str,
    with_bias: bool,
    scale: float,
    cap: float | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    hidden, weight, bias, target = operands(dtype)
    sets = sets_of(name, hidden, weight)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for into, wide in ((found, dtype), (expected, torch.float64)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (hidden, weight, bias)]
        h, w, b = leaves
        used = leaves if with_bias else leaves[:2]
        if into is found:
            loss = sampled_cross_entropy(
                h, w, target, sets, bias_V=b if with_bias else None, scale=scale, cap=cap
            )
        else:
            z = scale * F.linear(h, w, b if with_bias else None)
            z = z if cap is None else cap * torch.tanh(z / cap)
            loss, counted = reference(z, target, sets, largest=name.startswith("sce"))
            assert (counted < N) == (name == "sce, few positions")
        into += [loss.detach(), *torch.autograd.grad(3 * loss, used)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name", SETS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    hidden, weight, bias, target = operands()
    sets = sets_of(name, hidden, weight)
    directions = [torch.randn_like(t) for t in (hidden, weight, bias)]

    def loss(step: float) -> Tensor:
        h, w, b = (t + step * d for t, d in zip((hidden, weight, bias), directions, strict=True))
        return sampled_cross_entropy(h, w, target, sets, bias_V=b, cap=4.0)

    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    h, w, b = leaves
    gradients = torch.autograd.grad(
        sampled_cross_entropy(h, w, target, sets, bias_V=b, cap=4.0), leaves
    )
    along = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert float(loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(along, rel=1e-6)


@pytest.mark.parametrize(
    "sets",
    [
        lambda h, w: sce_sets(h, w, generator_of(1), buckets=3, positions=N, classes=V + 5),
        lambda h, w: rece_sets(h, w, generator_of(1), chunks=1),
        lambda h, w: rece_sets(h, w, generator_of(1), chunks=4, neighbours=3, rounds=2),
    ],
)
def test_sets_of_all_classes_give_the_full_loss(sets: Any) -> None:
    hidden, weight, _, target = operands()
    results = []
    for whole in (True, False):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        chosen = sets(hidden, weight)
        loss = (
            linear_cross_entropy(h, w, target)
            if whole
            else sampled_cross_entropy(h, w, target, chosen)
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, [h, w])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mix", [True, False])
def test_buckets_of_sce_have_the_largest_products(mix: bool) -> None:
    hidden, weight, _, _ = operands()
    sets = sce_sets(hidden, weight, generator_of(3), classes=7, mix=mix)
    usual = int(2 * math.sqrt(N))
    assert len(sets.rows) == len(sets.classes) == usual == 9
    drawn = torch.randn((usual, N if mix else I), generator=generator_of(3)).double()
    vectors = drawn @ hidden if mix else drawn
    for vector, rows, classes in zip(vectors, sets.rows, sets.classes, strict=True):
        for items, chosen, count in ((hidden, rows, usual), (weight, classes, 7)):
            products = items @ vector
            left_out = torch.ones(len(items), dtype=torch.bool)
            left_out[chosen] = False
            assert len(set(chosen.tolist())) == count
            assert products[chosen].min() > products[left_out].max()


def test_chunks_of_rece_are_neighbours_in_the_order_of_their_vectors() -> None:
    hidden, weight, _, _ = operands()
    sets = rece_sets(hidden, weight, generator_of(3), chunks=6, rounds=2)
    draw = generator_of(3)
    assert len(sets.rows) == 12
    for first in (0, 6):
        vectors = torch.randn((6, I), generator=draw).double()
        orders = []
        for items in (hidden, weight):
            nearest = (items @ vectors.T).argmax(1).tolist()
            orders.append(sorted(range(len(items)), key=lambda k, n=nearest: n[k]))  # type: ignore[misc]
        for chunk in range(6):
            rows = orders[0][chunk * N // 6 : (chunk + 1) * N // 6]
            low, high = max(0, chunk - 1), min(6, chunk + 2)
            classes = orders[1][low * V // 6 : high * V // 6]
            assert sets.rows[first + chunk].tolist() == rows
            assert sets.classes[first + chunk].tolist() == classes


def test_default_number_of_chunks() -> None:
    hidden, weight = torch.randn(300, I), torch.randn(500, I)
    assert len(rece_sets(hidden, weight, generator_of(1)).rows) == 60  # sqrt(4 * 3 * 300)
    assert len(rece_sets(hidden, weight, generator_of(1), neighbours=0).rows) == 34
    assert len(rece_sets(hidden[:5], weight, generator_of(1)).rows) == 5  # no empty chunk
    assert len(rece_sets(hidden, weight[:4], generator_of(1)).rows) == 4


def test_generators_follow_their_numbers_in_order() -> None:
    def draw(*numbers: int) -> list[int]:
        return torch.randint(2**62, (3,), generator=generator_of(*numbers)).tolist()

    assert draw(42, 7, 1, 0) == draw(42, 7, 1, 0)
    others = [draw(42, 7, 1, 0), draw(42, 1, 7, 0), draw(42, 8, 1, 0), draw(42, 7, 2, 0)]
    assert len({tuple(numbers) for numbers in others}) == 4


@pytest.mark.parametrize("name", SETS)
def test_the_same_sets_give_the_same_bits(name: str) -> None:
    hidden, weight, _, target = operands(torch.float32)
    results = []
    for _ in range(2):
        leaves = h, w = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = sampled_cross_entropy(h, w, target, sets_of(name, hidden, weight))
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    hidden, weight, _, target = operands(dtype)
    sets = sets_of(name, hidden, weight)
    results = []
    for wide in (dtype, torch.float64):
        leaves = h, w = [t.to(wide).requires_grad_() for t in (hidden, weight)]
        loss = sampled_cross_entropy(h, w, target, sets)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert [t.dtype for t in results[0]] == [torch.float32, dtype, dtype]
    for a, b in zip(*results, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (0.02 if dtype is torch.bfloat16 else 0.002)


@pytest.mark.parametrize("name", ["sce", "rece"])
def test_only_trainable_operands_get_a_gradient(name: str) -> None:
    hidden, weight, bias, target = operands()
    sets = sets_of(name, hidden, weight)
    hidden.requires_grad_()
    loss = sampled_cross_entropy(hidden, weight, target, sets, bias_V=bias)
    assert [t.shape for t in loss.grad_fn.saved_tensors if t is not None] == [(N, I)]  # type: ignore[union-attr]
    loss.backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert sampled_cross_entropy(hidden, weight, target, sets).grad_fn is None


@pytest.mark.parametrize("choose", [sce_sets, rece_sets])
def test_peak_memory_is_far_below_that_of_the_logits(choose: Any) -> None:
    """For 512 x 65,536 logits of 128 MiB."""
    tokens, vocabulary, width = 512, 65_536, 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    target = torch.randint(0, vocabulary, (tokens,))
    meter = MemoryMeter()
    meter.watch(nn.Module(), bases=(hidden, weight, target))
    before = sum(meter.live().values())
    with meter.phase("backward"):
        sets = choose(hidden.detach(), weight, generator_of(1))
        torch.autograd.grad(sampled_cross_entropy(hidden, weight, target, sets), hidden)
    found = meter.peak("backward")
    assert found is not None
    assert found.peak_bytes - before < tokens * vocabulary * 4 / 7  # a block of 16 MiB and little
