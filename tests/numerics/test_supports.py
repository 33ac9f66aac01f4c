"""Chosen entries and their scores, by hand and by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.supports import (
    ScoreStream,
    allocate,
    energy_share,
    largest_entries,
)


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize(
    "values",
    [
        torch.ones(3, 4),
        -torch.ones(3, 4),
        torch.zeros(3, 4),
        torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 3),
        torch.tensor([[0.0, 0.0, 0.0, 5.0]] * 3),
    ],
    ids=["equal", "equal negative", "zeros", "signs", "few non-zero"],
)
def test_exactly_count_entries_under_ties(values: torch.Tensor, count: int) -> None:
    positions = largest_entries(values, count)
    assert positions.shape == (count,)
    assert positions.dtype == torch.int64
    assert len(set(positions.tolist())) == count
    assert positions.tolist() == sorted(positions.tolist())
    assert int(positions.min()) >= 0 and int(positions.max()) < values.numel()


def test_largest_magnitudes_are_chosen() -> None:
    values = torch.tensor([[0.5, -9.0, 1.0], [8.0, -0.1, -7.0]])
    assert largest_entries(values, 3).tolist() == [1, 3, 5]
    assert largest_entries(-values, 3).tolist() == [1, 3, 5]
    all_negative = torch.tensor([-1.0, -4.0, -2.0, -3.0])
    assert largest_entries(all_negative, 2).tolist() == [1, 3]


def test_chosen_entries_are_at_least_as_large_as_others() -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    for count in (1, 12, 600, 1199):
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[largest_entries(values, count)] = True
        assert int(chosen.sum()) == count
        flat = values.reshape(-1).abs()
        assert flat[chosen].min() >= flat[~chosen].max()


def test_positions_are_in_row_order_for_transposed_views() -> None:
    values = torch.zeros(2, 3)
    values[0, 2] = 5.0
    assert largest_entries(values, 1).tolist() == [2]
    assert largest_entries(values.T, 1).tolist() == [4]  # row 2, column 0 of the (3, 2) view


def test_all_entries() -> None:
    assert largest_entries(torch.randn(3, 4), 12).tolist() == list(range(12))


@pytest.mark.parametrize("count", [0, -1, 13])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="of 12 entries"):
        largest_entries(torch.ones(3, 4), count)


def test_choice_is_deterministic() -> None:
    values = torch.ones(50, 50)
    assert torch.equal(largest_entries(values, 100), largest_entries(values.clone(), 100))


def test_energy_share_by_hand() -> None:
    matrix = torch.tensor([[3.0, -4.0], [0.0, 12.0]])  # squares 9, 16, 0, 144 of 169
    assert energy_share(matrix, 0.25) == pytest.approx(144 / 169)
    assert energy_share(matrix, 0.5) == pytest.approx(160 / 169)
    assert energy_share(matrix, 0.75) == pytest.approx(1.0)
    assert energy_share(matrix, 1.0) == pytest.approx(1.0)


def test_energy_share_takes_at_least_one_entry() -> None:
    assert energy_share(torch.tensor([[3.0, 4.0]]), 0.01) == pytest.approx(16 / 25)


def test_energy_share_of_zeros_is_zero() -> None:
    assert energy_share(torch.zeros(4, 4), 0.01) == 0.0


def test_energy_share_of_equal_entries_is_the_fraction() -> None:
    assert energy_share(torch.full((100, 100), -0.3), 0.01) == pytest.approx(0.01)


def test_energy_share_is_computed_in_float64() -> None:
    assert energy_share(torch.full((10, 10), 1e-30), 0.1) == pytest.approx(0.1)


def worth(*shapes: tuple[int, int], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.1, 5, len(shapes))
    return [a * torch.rand(s, generator=generator) for a, s in zip(scales, shapes, strict=True)]


@pytest.mark.parametrize("count", [3, 4, 20, 61, 62])
def test_model_allocation_picks_the_best_and_at_least_one_each(count: int) -> None:
    scores = worth((4, 5), (3, 4), (5, 6))
    chosen = allocate(scores, count)
    assert sum(len(c) for c in chosen) == count
    everything = torch.cat([s.reshape(-1) for s in scores])
    forced = sum(
        float(s.max()) < float(everything.sort(descending=True).values[count - 1]) for s in scores
    )
    best = everything.sort(descending=True).values[: count - forced]
    taken = torch.cat([s.reshape(-1)[c] for s, c in zip(scores, chosen, strict=True)])
    assert torch.equal(taken.sort(descending=True).values[: count - forced], best)
    for score, positions in zip(scores, chosen, strict=True):
        assert int(score.argmax()) in positions.tolist()
        assert positions.tolist() == sorted(set(positions.tolist()))


def test_target_with_zero_scores_gets_one_entry() -> None:
    scores = [torch.zeros(3, 3), torch.ones(3, 3)]
    assert [len(c) for c in allocate(scores, 6)] == [1, 5]


@pytest.mark.parametrize("count", [0, 1, 19])
def test_impossible_allocation_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot choose"):
        allocate([torch.ones(3, 3), torch.ones(3, 3)], count)


def test_share_of_a_part_is_relative_to_the_whole() -> None:
    whole = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert energy_share(torch.tensor([[3.0]]), 0.25, whole) == pytest.approx(9 / 25)
    assert energy_share(torch.tensor([[3.0]]), 1.0, whole) == pytest.approx(9 / 25)


OUT, IN, R_OUT, R_IN, TOKENS, STEPS = 7, 9, 4, 5, 11, 3


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def basis() -> Basis:
    q_out, q_in = (torch.linalg.qr(draw(side, side, seed=side)).Q for side in (OUT, IN))
    return Basis(q_out[:, :R_OUT], q_in[:, :R_IN], torch.ones(R_OUT), torch.ones(R_IN))


def tokens() -> list[tuple[Tensor, Tensor]]:
    return [(draw(TOKENS, OUT, seed=n), draw(TOKENS, IN, seed=100 + n)) for n in range(STEPS)]


def streamed(score: str, pieces: int = 1) -> Tensor:
    stream = ScoreStream(basis(), score)
    for g, x in tokens():
        for part in torch.arange(TOKENS).tensor_split(pieces):
            stream.add_tokens(g[part], x[part])
        stream.end_step()
    return stream.mean()


@pytest.mark.parametrize("pieces", [1, 3])
def test_gradient_is_the_mean_magnitude_of_the_core_gradient(pieces: int) -> None:
    """G = g'x in the basis; magnitudes are taken of the gradient of a whole step."""
    cores = torch.stack([to_core(g.T @ x, basis()) for g, x in tokens()])
    torch.testing.assert_close(streamed("gradient", pieces), cores.abs().mean(0))
    torch.testing.assert_close(streamed("square", pieces), cores.square().mean(0))
    torch.testing.assert_close(streamed("mean", pieces), cores.mean(0).abs())


@pytest.mark.parametrize("pieces", [1, 3])
def test_token_square_sums_the_squares_of_each_token(pieces: int) -> None:
    expected = torch.zeros(R_OUT, R_IN, dtype=torch.float64)
    for g, x in tokens():
        for n in range(TOKENS):
            expected += to_core(torch.outer(g[n], x[n]), basis()).square() / STEPS
    torch.testing.assert_close(streamed("token_square", pieces), expected)


def test_unknown_score_and_empty_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown score 'best'"):
        ScoreStream(basis(), "best")
    assert not ScoreStream(basis(), "square").mean().any()
