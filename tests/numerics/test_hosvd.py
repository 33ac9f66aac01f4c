"""Bases from streamed Gram matrices equal the SVD of the stacked unfoldings; their truncation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import (
    Basis,
    GramStream,
    by_columns,
    principal_directions,
    truncated,
)
from sparsegrad_cli.numerics.supports import spectral_scores

OUT, IN, STEPS = 7, 5, 9


def gradients(count: int = STEPS, seed: int = 0) -> list[Tensor]:
    """Return gradients with a decaying spectrum, so that singular vectors are well separated."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.diag(2.0 ** -torch.arange(OUT, dtype=torch.float64))
    right = torch.diag(3.0 ** -torch.arange(IN, dtype=torch.float64))
    mix_out = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator, dtype=torch.float64)).Q
    mix_in = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    return [
        mix_out
        @ left
        @ torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
        @ right
        @ mix_in.T
        for _ in range(count)
    ]


def streamed(grads: list[Tensor], dtype: torch.dtype = torch.float64) -> GramStream:
    stream = GramStream(OUT, IN, dtype=dtype)
    for grad in grads:
        stream.add(grad)
    return stream


def assert_same_up_to_sign(got: Tensor, expected: Tensor, tolerance: float) -> None:
    cosines = (got * expected).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=tolerance, rtol=0)


def test_bases_are_the_svd_factors_of_the_stacked_unfoldings() -> None:
    grads = gradients()
    basis = streamed(grads).basis()
    # unfold along out: (out, T x in); along in: (in, T x out)
    left = torch.linalg.svd(torch.cat(grads, dim=1), full_matrices=False)
    right = torch.linalg.svd(torch.cat([g.T for g in grads], dim=1), full_matrices=False)
    assert_same_up_to_sign(basis.q_out, left.U, 1e-9)
    assert_same_up_to_sign(basis.q_in, right.U, 1e-9)
    torch.testing.assert_close(basis.singular_out, left.S, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(basis.singular_in, right.S, atol=1e-9, rtol=1e-6)


def test_bases_are_orthonormal_and_full_rank() -> None:
    basis = streamed(gradients()).basis()
    assert basis.q_out.shape == (OUT, OUT)
    assert basis.q_in.shape == (IN, IN)
    for q in (basis.q_out, basis.q_in):
        torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), atol=1e-12, rtol=0)


def test_directions_are_sorted_and_hold_their_energy() -> None:
    grads = gradients()
    basis = streamed(grads).basis()
    for values in (basis.singular_out, basis.singular_in):
        assert (values[:-1] >= values[1:]).all()
    for number in range(OUT):
        energy = sum(float((basis.q_out[:, number] @ g).square().sum()) for g in grads)
        assert energy == pytest.approx(float(basis.singular_out[number]) ** 2, rel=1e-6)


def test_low_rank_gradient_gives_square_orthonormal_bases() -> None:
    rank_one = torch.outer(torch.arange(1.0, OUT + 1), torch.arange(1.0, IN + 1)).double()
    basis = streamed([rank_one]).basis()
    torch.testing.assert_close(
        basis.q_out.T @ basis.q_out, torch.eye(OUT).double(), atol=1e-12, rtol=0
    )
    assert basis.singular_out[0] == pytest.approx(float(rank_one.norm()))
    assert torch.isfinite(basis.singular_out).all()
    assert float(basis.singular_out[1:].max()) < 1e-6 * float(basis.singular_out[0])


def test_all_zero_gradients_give_an_orthonormal_basis_without_nan() -> None:
    basis = streamed([torch.zeros(OUT, IN).double()]).basis()
    torch.testing.assert_close(basis.q_in.T @ basis.q_in, torch.eye(IN).double())
    assert basis.singular_in.tolist() == [0.0] * IN


def test_merge_is_the_stream_of_the_union() -> None:
    grads = gradients()
    first, second = streamed(grads[:4]), streamed(grads[4:])
    first.merge(second)
    whole = streamed(grads)
    assert first.count == whole.count == STEPS
    torch.testing.assert_close(first.gram_out, whole.gram_out, atol=1e-12, rtol=0)
    torch.testing.assert_close(first.gram_in, whole.gram_in, atol=1e-12, rtol=0)
    assert second.count == STEPS - 4, "the merged stream itself is not changed"


def test_bytes_of_a_stream_do_not_depend_on_its_length() -> None:
    stream = GramStream(OUT, IN)
    empty = stream.nbytes()
    assert empty == 4 * (OUT * OUT + IN * IN)
    held = set()
    for grad in gradients(50):
        stream.add(grad)
        held.add(stream.nbytes())
        tensors = [v for v in vars(stream).values() if isinstance(v, Tensor)]
        assert len(tensors) == 3, "nothing but the two sums and a count is kept"
    assert held == {empty}


def test_half_precision_gradients_are_summed_in_float32() -> None:
    stream = GramStream(2, 2)
    tiny = torch.full((2, 2), 2.0**-6, dtype=torch.bfloat16)
    for _ in range(4096):
        stream.add(tiny)
    # bfloat16 would stop growing at 256 x its smallest step
    assert float(stream.gram_out[0, 0]) == pytest.approx(4096 * 2 * 2.0**-12, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient_is_refused(bad: float) -> None:
    grads = gradients()
    grads[3][1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        streamed(grads).basis()


def test_overflow_of_the_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        streamed([torch.full((OUT, IN), 1e25)], torch.float32).basis()


def test_empty_stream_has_no_basis() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        GramStream(OUT, IN).basis()


def test_signs_are_fixed_by_the_largest_entry_of_each_column() -> None:
    grads = gradients()
    basis = streamed(grads).basis()
    for q in (basis.q_out, basis.q_in):
        largest = q.gather(0, q.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()
    mirrored = streamed([-g for g in grads]).basis()  # the same Grams
    assert torch.equal(mirrored.q_out, basis.q_out)
    assert torch.equal(mirrored.q_in, basis.q_in)


def test_same_numbers_give_the_same_bits() -> None:
    first, second = (streamed(gradients(), torch.float32).basis() for _ in range(2))
    for part in ("q_out", "q_in", "singular_out", "singular_in"):
        assert torch.equal(getattr(first, part), getattr(second, part))


def test_principal_directions_of_a_diagonal_matrix_by_hand() -> None:
    vectors, values = principal_directions(torch.diag(torch.tensor([4.0, 25.0, 9.0])))
    assert values.tolist() == pytest.approx([5.0, 3.0, 2.0])
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(vectors, expected)


def test_nbytes_counts_the_two_bases() -> None:
    basis = Basis(torch.zeros(6, 4), torch.zeros(3, 2), torch.zeros(4), torch.zeros(2))
    assert basis.nbytes() == 4 * (24 + 6)


def basis(out: int = 12, wide: int = 5) -> Basis:
    g = torch.Generator().manual_seed(0)
    stream = GramStream(out, wide, dtype=torch.float64)
    for _ in range(20):
        stream.add(torch.randn(out, wide, generator=g, dtype=torch.float64))
    return stream.basis()


@pytest.mark.parametrize(("rank", "shape"), [(3, (3, 3)), (8, (8, 5)), (100, (12, 5))])
def test_truncation_by_number(rank: int, shape: tuple[int, int]) -> None:
    whole = basis()
    cut = truncated(whole, rank)
    assert (cut.q_out.shape[1], cut.q_in.shape[1]) == shape
    assert torch.equal(cut.q_out, whole.q_out[:, : shape[0]])
    assert torch.equal(cut.singular_in, whole.singular_in[: shape[1]])
    assert len(spectral_scores(cut)) == shape[0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncation_by_energy_keeps_the_fewest_that_hold_the_share(share: float) -> None:
    whole = basis()
    cut = truncated(whole, share)
    for kept, every in (
        (cut.singular_out, whole.singular_out),
        (cut.singular_in, whole.singular_in),
    ):
        total = every.square().sum()
        assert kept.square().sum() >= share * total * (1 - 1e-9)
        assert kept[:-1].square().sum() < share * total


def test_truncation_to_full_rank_is_the_same_basis() -> None:
    whole = basis()
    assert truncated(whole, None) is whole
    assert truncated(whole, 1.0).q_out.shape == (12, 12)
    zero = Basis(whole.q_out, whole.q_in, torch.zeros(12), torch.zeros(5))
    assert truncated(zero, 0.5).q_in.shape == (5, 5)


def test_truncated_directions_are_freed() -> None:
    cut = truncated(basis(), 2)
    for q in (cut.q_out, cut.q_in):
        assert q.untyped_storage().nbytes() == q.numel() * q.element_size()
        assert q.T.is_contiguous()


def test_column_order_is_the_same_matrix() -> None:
    matrix = torch.randn(4, 3)
    stored = by_columns(matrix)
    assert torch.equal(stored, matrix)
    assert stored.stride() == (1, 4)
    assert by_columns(stored).data_ptr() == stored.data_ptr()
