"""Scores of core parameters equal their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.supports import ScoreStream

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
