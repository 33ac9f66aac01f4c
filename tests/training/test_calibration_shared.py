"""Calibration whose steps several processes share: sums and counts of all, in each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batches, classifier, one_thread, targets_of
from torch import Tensor

from sparsegrad_cli import ranks
from sparsegrad_cli.recipe.schema import CalibrationSection
from sparsegrad_cli.training.calibration import Calibration, calibrate

WAYS: list[dict[str, Any]] = [
    {"source": "batch", "decomposition": "exact"},
    {"source": "batch", "decomposition": "sequential"},
    {"source": "token", "decomposition": "randomized", "power_steps": 1},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["decomposition"])
def test_a_process_without_a_step_of_its_own_goes_on_with_the_others(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer steps than processes: what the one with steps says, the one without hears."""
    said: list[Tensor] = []

    def calibrated(steps: int) -> Calibration:
        model = classifier()
        settings = CalibrationSection(steps=max(1, steps), score="square", **way)
        settings = settings.model_copy(update={"steps": steps})
        return calibrate(model, targets_of(model), batches, settings, seed=0, rank=4)

    with one_thread():
        monkeypatch.setattr(ranks, "add_up", lambda ts: said.extend(t.clone() for t in ts))
        worker = calibrated(2)
        monkeypatch.setattr(ranks, "add_up", lambda ts: [t.add_(said.pop(0)) for t in ts])
        idle = calibrated(0)
    assert not said and not idle.losses and len(worker.losses) > 2
    assert {stream.count for stream in idle.streams.values()} == {
        stream.count for stream in worker.streams.values()
    }
    for key, basis in worker.bases.items():
        for mine, theirs in zip(vars(idle.bases[key]).values(), vars(basis).values(), strict=True):
            assert torch.equal(mine, theirs)
    for name, score in worker.scores.items():
        assert torch.equal(idle.scores[name], score)
