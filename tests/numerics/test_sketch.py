"""Randomized range finder and sequential truncation, compared with exact Grams in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import (
    GramStream,
    SequentialStream,
    principal_directions,
    truncated,
)
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.sketch import SPARE_COLUMNS, SketchStream, nystroem

OUT, IN, RANK = 90, 130, 12


def gradients(count: int = 6, decay: float = 0.8, seed: int = 0) -> list[Tensor]:
    """Return (OUT, IN) matrices that share directions of decaying strength."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(draw(side, side)).Q for side in (OUT, IN))
    strength = decay ** torch.arange(OUT, dtype=torch.float64)
    # (out, out) @ (out, out) @ (out, in)
    return [
        left @ (strength[:, None] * draw(OUT, OUT) * strength) @ right[:, :OUT].T
        for _ in range(count)
    ]


def exact(grads: list[Tensor]) -> GramStream:
    stream = GramStream(OUT, IN, dtype=torch.float64)
    for grad in grads:
        stream.add(grad)
    return stream


def sketched(
    grads: list[Tensor], dtype: torch.dtype = torch.float64, power_steps: int = 0, rank: int = RANK
) -> SketchStream:
    stream = SketchStream(OUT, IN, rank=rank, power_steps=power_steps, dtype=dtype)
    for number in range(stream.passes):
        if number:
            stream.next_pass()
        for grad in grads:
            stream.add(grad)
    return stream


def captured(gram: Tensor, q: Tensor) -> float:
    """Return the share of the energy of a Gram matrix in the span of q."""
    return float((q.T.double() @ gram @ q.double()).trace() / gram.trace())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sketch_captures_as_much_as_exact_directions(dtype: torch.dtype) -> None:
    grads = gradients()
    best, found = truncated(exact(grads).basis(), RANK), sketched(grads, dtype).basis()
    for gram, q_best, q in (
        (exact(grads).gram_out, best.q_out, found.q_out),
        (exact(grads).gram_in, best.q_in, found.q_in),
    ):
        assert q.shape == q_best.shape
        assert captured(gram, q) > captured(gram, q_best) - 1e-4
        identity = torch.eye(RANK, dtype=torch.float64)
        torch.testing.assert_close(q.T.double() @ q.double(), identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.singular_in.double(), best.singular_in.double(), rtol=2e-2, atol=1e-6
    )


def test_narrow_sides_are_exact() -> None:
    """A side too narrow for two thin matrices gives the same directions, including signs."""
    grads = gradients(decay=0.9)
    found = sketched(grads, rank=IN)
    best = exact(grads).basis()
    leading = slice(0, 20)
    torch.testing.assert_close(found.basis().q_out[:, leading], best.q_out[:, leading])
    torch.testing.assert_close(found.basis().q_in[:, leading], best.q_in[:, leading])
    assert found.of_in.omega is None and found.of_out.omega is None


def test_power_step_helps_with_a_flat_spectrum() -> None:
    grads = gradients(decay=0.985)
    gram = exact(grads).gram_in
    plain, powered = (captured(gram, sketched(grads, power_steps=n).basis().q_in) for n in (0, 2))
    ideal = captured(gram, truncated(exact(grads).basis(), RANK).q_in)
    assert plain < powered <= ideal + 1e-12
    assert ideal - powered < (ideal - plain) / 4


def test_token_counts_equal_the_grams() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = 0.8 ** torch.arange(IN, dtype=torch.float64)
    g = torch.randn(50, OUT, generator=generator, dtype=torch.float64)
    x = torch.randn(50, IN, generator=generator, dtype=torch.float64) * scale
    g[7:11] = 0  # padding: the loss does not depend on it
    x[7:11] = 1e6
    full = GramStream(OUT, IN, dtype=torch.float64)
    full.add_tokens(g, x)
    thin = SketchStream(OUT, IN, rank=RANK, dtype=torch.float64)
    thin.add_tokens(g, x)
    assert thin.of_in.omega is not None and thin.of_out.omega is not None
    torch.testing.assert_close(thin.of_in.sum, full.gram_in @ thin.of_in.omega)
    torch.testing.assert_close(thin.of_out.sum, full.gram_out @ thin.of_out.omega)
    assert float(thin.token_weight) == float(full.token_weight) == 46


def test_weighted_grams_are_those_of_the_gradients_of_single_tokens() -> None:
    """They equal the Grams of g_n' x_n one by one, whatever their sum cancels."""
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(30, OUT, generator=generator, dtype=torch.float64)
    x = torch.randn(30, IN, generator=generator, dtype=torch.float64).exp()
    g[3] = 0
    one_by_one = GramStream(OUT, IN, dtype=torch.float64)
    for g_O, x_I in zip(g, x, strict=True):
        one_by_one.add(torch.outer(g_O, x_I))
    full, before = GramStream(OUT, IN, dtype=torch.float64), (g.clone(), x.clone())
    full.add_tokens(g, x, weighted=True)
    assert torch.equal(g, before[0]) and torch.equal(x, before[1])
    torch.testing.assert_close(full.gram_out, one_by_one.gram_out)
    torch.testing.assert_close(full.gram_in, one_by_one.gram_in)
    torch.testing.assert_close(full.token_weight, one_by_one.gram_out.trace())
    thin = SketchStream(OUT, IN, rank=RANK, dtype=torch.float64)
    thin.add_tokens(g, x, weighted=True)
    assert thin.of_in.omega is not None
    torch.testing.assert_close(thin.of_in.sum, one_by_one.gram_in @ thin.of_in.omega)


def test_sketch_bytes_are_small_and_merge_adds() -> None:
    grads = gradients(4)
    whole, left, right = sketched(grads), sketched(grads[:1]), sketched(grads[1:])
    assert whole.nbytes() == 2 * 8 * (OUT + IN) * (RANK + SPARE_COLUMNS)
    for total, a, b in zip(whole.sums(), left.sums(), right.sums(), strict=True):
        torch.testing.assert_close(total, a + b)


def test_low_rank_gram_gives_an_orthonormal_basis() -> None:
    """With fewer directions in the data than requested, the rest is arbitrary but orthonormal."""
    grads = gradients(1)
    thin = grads[0][:, :1] @ grads[0][:1]  # (out, 1) @ (1, in)
    basis = sketched([thin], torch.float32).basis()
    identity = torch.eye(RANK)
    torch.testing.assert_close(basis.q_out.T @ basis.q_out, identity, rtol=0, atol=1e-5)
    assert float(basis.singular_out[0]) == pytest.approx(float(thin.norm()), rel=1e-3)
    assert float(basis.singular_out[1]) < 1e-2 * float(basis.singular_out[0])


def test_shift_does_not_change_the_basis() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.25, 0.0]))
    q, singular = nystroem(torch.eye(4), gram, 4)
    torch.testing.assert_close(singular, torch.tensor([2.0, 1.0, 0.5, 0.0]), rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(q, torch.eye(4), rtol=0, atol=1e-5)


def test_empty_and_invalid_sketches_are_refused() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        SketchStream(OUT, IN, rank=RANK).basis()
    stream = SketchStream(OUT, IN, rank=RANK)
    stream.add(torch.full((OUT, IN), torch.inf))
    with pytest.raises(ValueError, match="not finite"):
        stream.basis()


def in_two_passes(grads: list[Tensor], rank: int | float | None) -> SequentialStream:
    stream = SequentialStream(grads[0].shape[0], grads[0].shape[1], rank=rank, dtype=torch.float64)
    for number in range(stream.passes):
        if number:
            stream.next_pass()
        for grad in grads:
            stream.add(grad)
    return stream


@pytest.mark.parametrize("flip", [False, True])
def test_sequential_truncation_equals_the_formula(flip: bool) -> None:
    grads = [g.T if flip else g for g in gradients()]
    found = in_two_passes(grads, RANK).basis()
    grams = [sum(g @ g.T for g in grads), sum(g.T @ g for g in grads)]
    narrow, wide = (1, 0) if flip else (0, 1)
    assert isinstance(grams[narrow], Tensor)
    q_narrow = principal_directions(grams[narrow])[0][:, :RANK]  # type: ignore[arg-type]
    projected = [q_narrow.T @ (g.T if flip else g) for g in grads]
    q_wide, singular = principal_directions(sum(p.T @ p for p in projected))  # type: ignore[arg-type]
    got = (found.q_out, found.q_in)
    torch.testing.assert_close(got[narrow], q_narrow)
    leading = slice(0, RANK)
    torch.testing.assert_close(got[wide][:, leading], q_wide[:, leading])
    torch.testing.assert_close((found.singular_out, found.singular_in)[wide], singular)


def test_sequential_truncation_at_full_rank_is_hosvd() -> None:
    grads = gradients()
    found, best = in_two_passes(grads, None).basis(), exact(grads).basis()
    leading = slice(0, 30)
    torch.testing.assert_close(found.q_in[:, leading], best.q_in[:, leading])
    torch.testing.assert_close(found.q_out[:, leading], best.q_out[:, leading])


def test_sequential_keeps_no_less_energy_in_the_core_than_truncation() -> None:
    """The wide side is chosen for the kept part of the narrow one; HOSVD chooses each alone."""
    grads = gradients(decay=0.95)
    rank = 6
    plain = truncated(exact(grads).basis(), rank)
    sequential = truncated(in_two_passes(grads, rank).basis(), rank)
    energy = [
        sum(float(to_core(g, basis).square().sum()) for g in grads) for basis in (plain, sequential)
    ]
    assert energy[1] >= energy[0] * (1 - 1e-12)


def test_sequential_refuses_tokens_and_a_missing_pass() -> None:
    stream = SequentialStream(OUT, IN, rank=RANK)
    with pytest.raises(ValueError, match="no gradient"):
        stream.next_pass()
    stream.add(torch.ones(OUT, IN))
    with pytest.raises(ValueError, match="no gradient"):
        stream.basis()
    with pytest.raises(NotImplementedError):
        stream.add_tokens(torch.ones(2, OUT), torch.ones(2, IN))
    assert stream.nbytes() == 4 * OUT * OUT
    stream.next_pass()
    assert stream.nbytes() == 4 * IN * IN
