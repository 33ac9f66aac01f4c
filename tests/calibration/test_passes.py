"""Calibration in several passes: thin products, projections, scores; alone and in two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    HIDDEN,
    batches,
    calibrated,
    classifier,
    one_thread,
    snapshot,
    targets_of,
)
from support.warm_python import run_two_ranks
from torch import Tensor

from sparsegrad_cli.calibration.calibrate import passes_of
from sparsegrad_cli.calibration.gradients import gradient_step, gradients_only
from sparsegrad_cli.numerics.hosvd import truncated
from sparsegrad_cli.numerics.rotation import to_core
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.recipe.schema import CalibrationSection

RANK = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("section", "count"),
    [
        ({}, 1),
        ({"score": "square"}, 2),
        ({"decomposition": "sequential"}, 2),
        ({"decomposition": "randomized"}, 1),
        ({"decomposition": "randomized", "power_steps": 2, "source": "token"}, 3),
        ({"source": "random"}, 0),
        ({"source": "original", "score": "gradient"}, 1),
    ],
)
def test_every_pass_sees_the_same_batches_and_dropout(section: dict[str, Any], count: int) -> None:
    model = classifier()
    told: list[tuple[int, float]] = []
    before = snapshot(model)
    found = calibrated(
        model,
        targets_of(model),
        steps=2,
        rank=RANK,
        on_step=lambda number, loss: told.append((number, loss)),
        **section,
    )
    assert passes_of(CalibrationSection(steps=2, **section)) == count
    assert [number for number, _ in told] == list(range(1, 2 * count + 1))
    assert found.losses == found.losses[:2] * count
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("source", ["batch", "token"])
def test_thin_sides_are_exact(source: str) -> None:
    """A sketch of rank + 32 columns spans a tiny model's sides: the exact basis comes out."""
    model = classifier()
    targets = targets_of(model)
    exact = calibrated(model, targets, steps=3, source=source)
    thin = calibrated(
        model, targets, steps=3, source=source, decomposition="randomized", rank=HIDDEN
    )
    for key, basis in exact.bases.items():
        best, found = truncated(basis, HIDDEN), thin.bases[key]
        torch.testing.assert_close(
            found.singular_out,
            best.singular_out,
            rtol=1e-2,
            atol=1e-3 * float(basis.singular_out[0]),
        )
        overlap = (found.q_in[:, :3].T @ best.q_in[:, :3]).square().sum()
        assert float(overlap) == pytest.approx(3.0, abs=1e-2)


def test_a_sketch_holds_no_square_of_a_wide_side() -> None:
    wide, columns = 100, RANK + 32
    model = classifier(intermediate_size=wide)
    section: dict[str, Any] = {
        "decomposition": "randomized",
        "source": "token",
        "basis_per": "kind",
    }
    sizes = {
        calibrated(model, targets_of(model), steps=n, rank=RANK, **section).stream_bytes
        for n in (1, 4)
    }
    # Two kinds of layer in float32: the Gram matrix of the narrow side, two thin ones of the other.
    assert sizes == {2 * 4 * (HIDDEN * HIDDEN + 2 * wide * columns)}


def core_gradients(steps: int, bases: dict[str, Any]) -> dict[str, list[Tensor]]:
    """By the weights' own gradients, one list per target."""
    model = classifier()
    targets = targets_of(model)
    cores: dict[str, list[Tensor]] = {t.name: [] for t in targets}

    def collect(target: Any, grad_OI: Tensor) -> None:
        cores[target.name].append(to_core(grad_OI, truncated(bases[target.name], RANK)))

    source = batches()
    with gradients_only(model, targets, collect), temporary_seed(0):
        for number in range(steps):
            gradient_step(model, next(source), number)
    return cores


@pytest.mark.parametrize("score", ["gradient", "square"])
@pytest.mark.parametrize("basis_per", ["layer", "kind"])
def test_scores_are_those_of_the_weights_gradients(score: str, basis_per: str) -> None:
    model = classifier()
    found = calibrated(
        model, targets_of(model), steps=3, score=score, basis_per=basis_per, rank=RANK
    )
    for name, cores in core_gradients(3, found.by_target()).items():
        stack = torch.stack(cores)
        expected = (stack.square() if score == "square" else stack.abs()).mean(0)
        assert found.scores[name].shape == (RANK, RANK)
        torch.testing.assert_close(
            found.scores[name], expected, rtol=1e-3, atol=1e-5 * float(expected.max())
        )


def test_bases_that_know_nothing() -> None:
    model = classifier()
    targets = targets_of(model)
    original = calibrated(model, targets, source="original").by_target()
    random = [calibrated(model, targets, source="random", seed=s).by_target() for s in (0, 0, 1)]
    for target in targets:
        assert torch.equal(original[target.name].q_out, torch.eye(target.out_features))
        q = [bases[target.name].q_in for bases in random]
        torch.testing.assert_close(q[0].T @ q[0], torch.eye(target.in_features))
        assert torch.equal(q[0], q[1])
        assert not torch.equal(q[0], q[2])


def half_of_the_stream(rank: int, folder: str, section: dict[str, Any]) -> None:
    """One of two processes: every second batch."""
    import os
    from itertools import islice

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = calibrated(
        model,
        targets_of(model),
        lambda: islice(batches(), rank, None, 2),
        steps=2,
        rank=RANK,
        **section,
    )
    torch.save({k: b.q_in @ b.q_in.T for k, b in found.bases.items()}, f"{folder}/q{rank}")
    torch.save(found.scores, f"{folder}/s{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # The interpreter's own exit races with gloo's threads and aborts once in a few hundred runs;
    # all that the test reads is on disk by now.
    os._exit(0)


@pytest.mark.parametrize(
    "section",
    [
        {"score": "square"},
        {"decomposition": "randomized", "power_steps": 1, "source": "token", "score": "gradient"},
    ],
    ids=["exact", "randomized"],
)
def test_two_processes_find_what_one_does(
    tmp_path: Path, warm_client: str, section: dict[str, Any]
) -> None:
    model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    alone = calibrated(model, targets_of(model), steps=4, rank=RANK, **section)
    run_two_ranks(warm_client, half_of_the_stream, tmp_path, section)
    for rank in (0, 1):
        projections = torch.load(tmp_path / f"q{rank}", weights_only=True)
        for key, basis in alone.bases.items():
            torch.testing.assert_close(
                projections[key], basis.q_in @ basis.q_in.T, rtol=1e-3, atol=1e-3
            )
        scores = torch.load(tmp_path / f"s{rank}", weights_only=True)
        for name, score in alone.scores.items():
            torch.testing.assert_close(scores[name].sum(), score.sum(), rtol=1e-2, atol=1e-6)
