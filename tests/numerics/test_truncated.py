"""Truncated bases keep the leading directions, by number or energy, and free the rest."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_cli.numerics.hosvd import Basis, GramStream, by_columns, truncated
from sparsegrad_cli.numerics.supports import spectral_scores


def basis(out: int = 12, wide: int = 5) -> Basis:
    g = torch.Generator().manual_seed(0)
    stream = GramStream(out, wide, dtype=torch.float64)
    for _ in range(20):
        stream.add(torch.randn(out, wide, generator=g, dtype=torch.float64))
    return stream.basis()


@pytest.mark.parametrize(("rank", "shape"), [(3, (3, 3)), (8, (8, 5)), (100, (12, 5))])
def test_by_number(rank: int, shape: tuple[int, int]) -> None:
    whole = basis()
    cut = truncated(whole, rank)
    assert (cut.q_out.shape[1], cut.q_in.shape[1]) == shape
    assert torch.equal(cut.q_out, whole.q_out[:, : shape[0]])
    assert torch.equal(cut.singular_in, whole.singular_in[: shape[1]])
    assert len(spectral_scores(cut)) == shape[0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_by_energy_keeps_the_fewest_that_hold_the_share(share: float) -> None:
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
