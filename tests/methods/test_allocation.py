"""Allocation over the model: targets that few live tokens reach get their share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import SMALL, Cli
from support.tiny_models import batch, calibrated, classifier, one_thread, targets_of

from sparsegrad_cli.calibration.basis_file import (
    basis_digest,
    check_tokens,
    read_basis,
    write_basis,
)
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.sparsegrad.core import SparsegradCore
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.numerics.hosvd import GramStream, truncated
from sparsegrad_cli.numerics.supports import ScoreStream, comparable_scores, spectral_scores


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_square_of_a_comparable_score_is_the_sum_of_squares_over_tokens(tokens: int) -> None:
    """For independent g and x, in float64; s_i s_j alone is off by the number of tokens."""
    draw = torch.Generator().manual_seed(tokens)
    widths = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    g_NO, x_NI = (torch.randn(tokens, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    g_NO, x_NI = g_NO * widths, x_NI * widths
    stream = GramStream(3, 3, dtype=torch.float64)
    stream.add_tokens(torch.cat((g_NO, torch.zeros(9, 3))), torch.cat((x_NI, torch.ones(9, 3))))
    basis = stream.basis()
    assert basis.token_weight is not None
    assert float(basis.token_weight) == tokens, "padding does not count"
    exact = ScoreStream(basis, "token_square")
    exact.add_tokens(g_NO, x_NI)
    exact.end_step()
    found = comparable_scores(spectral_scores(basis), basis.token_weight).square()
    ratio = found / exact.mean()
    assert float((ratio - 1).abs().max()) < 8 / tokens**0.5
    shared = comparable_scores(spectral_scores(basis), basis.token_weight, sharing=4)
    torch.testing.assert_close(shared.square() * 4, found)


def test_live_tokens_are_counted_by_target() -> None:
    """Of the last block, a classifier reads one position a row."""
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    targets = targets_of(model)
    inputs = batch(size=4, length=6)
    inputs["attention_mask"][0, 4:] = 0
    for basis_per, decomposition in (("layer", "exact"), ("kind", "randomized")):
        found = calibrated(
            model,
            targets,
            lambda: iter([inputs] * 3),
            steps=3,
            rank=4,
            basis_per=basis_per,
            decomposition=decomposition,
            source="token",
        )
        tokens = {t.name: found.by_target()[t.name].token_weight for t in targets}
        alone = [3 * 22, 3 * 22, 3 * 22, 3 * 22, 3 * 4, 3 * 4]
        expected = alone if basis_per == "layer" else [3 * (22 + 22 + 4)] * 6
        assert [int(n) for n in tokens.values() if n is not None] == expected
    batches = calibrated(model, targets, lambda: iter([inputs] * 3), steps=3, source="batch")
    assert all(basis.token_weight is None for basis in batches.bases.values())


@pytest.mark.parametrize("basis_per", ["layer", "kind"])
def test_the_last_block_gets_what_its_gradients_deserve(basis_per: str) -> None:
    """The shares of the targets, against those by the sums of squares themselves."""
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    targets = targets_of(model)
    words: dict[str, Any] = {"source": "token", "steps": 4, "rank": 8, "basis_per": basis_per}
    method = SparsegradSettings(name="sparsegrad", density=0.03, rank=8, allocation="model")

    def shares(unknown: bool = False, **more: Any) -> list[int]:
        found = calibrated(model, targets, **words, **more)
        bases = {key: truncated(basis, 8) for key, basis in found.bases.items()}
        if unknown:
            bases = {key: replace(basis, token_weight=None) for key, basis in bases.items()}
        by_target = {t.name: bases[found.keys[t.name]] for t in targets}
        plans = SparsegradCore(method).planned(targets, by_target, found.scores)
        return [plan.count for plan in plans.values()]

    exact, spectral, starved = shares(score="token_square"), shares(), shares(unknown=True)
    assert sum(exact) == sum(spectral) == sum(starved)

    def miss(found: list[int]) -> int:
        return sum(abs(n - m) for n, m in zip(found, exact, strict=True))

    if basis_per == "layer":
        assert sum(spectral[-2:]) > 1.5 * sum(starved[-2:])
        assert miss(spectral) < 0.6 * miss(starved)
    else:
        # Targets of a kind share their sums, and so their shares.
        assert len(set(spectral[::2])) == len(set(spectral[1::2])) == 1


def test_a_basis_of_an_older_version_is_refused_where_it_cannot_tell(
    cli: Cli, tmp_path: Path, small_bert: str
) -> None:
    small = (f"model={small_bert}", "method.rank=32", *SMALL)
    made = cli("calibrate", *small, "calibration.energy_steps=0", "-o", "basis")
    assert made.code == 0, made.err
    path = tmp_path / "basis" / "basis.safetensors"
    basis = read_basis(path)
    assert all(one.token_weight is not None for one in basis.bases.values())
    check_tokens(basis)
    older = {key: replace(one, token_weight=None) for key, one in basis.bases.items()}
    digest = basis_digest(older, basis.scores)
    write_basis(path, replace(basis, bases=older, metadata=basis.metadata.changed(digest=digest)))
    assert read_basis(path).metadata.digest == digest
    with pytest.raises(UsageError):
        check_tokens(read_basis(path))
    recipe = (*small, f"calibration.basis={path}")
    refused = cli("train", *recipe, "method.allocation=model", "-o", "one")
    assert refused.code == 2
    assert "expected a basis that says how many tokens each target saw" in refused.flat
    assert "sparsegrad calibrate" in refused.flat
    assert cli("train", *recipe, "-o", "two").code == 0
