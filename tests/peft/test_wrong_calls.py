"""Wrong calls of the Python API: each raises one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import batch, classifier
from torch import nn
from torch.nn import functional as F

import sparsegrad_cli as sg


class Net(nn.Module):
    """Two linear layers, 12 to 24 to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


PAIRS = [(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]


def calibrated(**settings: Any) -> Any:
    return sg.calibrate(
        Net(), PAIRS, **{"loss": F.cross_entropy, "target_modules": ["up", "down"], **settings}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "calibrate: steps: 0 should be greater than or equal to 1$"),
        ({"source": "tokens"}, "calibrate: source: 'tokens' is not one of"),
        ({"rank": 0}, "rank is 0: expected a whole number from 1 to 24"),
        ({"rank": -1}, "rank is -1: expected a whole number from 1 to 24"),
        ({"rank": 9999}, "rank is 9999: expected a whole number from 1 to 24"),
        ({"rank": 8.5}, "rank is 8.5: expected a whole number"),
        ({"density": 2}, "density is 2: expected a number above 0 and up to 1"),
        ({"density": "0.1"}, "density is '0.1': expected a number"),
        ({"loss": "mse"}, "loss is of type str: expected a function"),
        ({"loss": lambda out, y: F.cross_entropy(out, y, reduction="none")}, "got shape "),
        ({"loss": lambda out, y: 1.0}, "got float"),
    ],
)
def test_calibrate_refuses_arguments_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        calibrated(**settings)
    assert "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PAIRS, Net()), "model is of type list: expected a torch.nn.Module as the first"),
        (("bert-base-uncased", PAIRS), "model is of type str"),
        ((Net(), "train.csv"), "batches is of type str: expected an iterable of batches"),
        ((Net(), {"input_ids": torch.zeros(1)}), "batches is of type dict"),
        ((Net(), None), "batches is of type NoneType"),
    ],
)
def test_calibrate_refuses_arguments_of_another_type(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sg.calibrate(*arguments, target_modules=["up"])


def test_calibrate_says_that_batches_lack_labels() -> None:
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    for warmup in (0, 50):
        with pytest.raises(ValueError, match="and no loss: batches need labels, or pass pairs"):
            sg.calibrate(classifier("bert"), [unlabelled], warmup_steps=warmup)
    with pytest.raises(ValueError, match="returned Tensor and no loss"):
        sg.calibrate(Net(), [{"x": PAIRS[0][0]}], target_modules=["up"])


def test_a_rank_between_the_sides_keeps_all_directions_of_the_narrow_side() -> None:
    basis = calibrated(rank=20).by_target()["up"]
    assert basis.q_out.shape == (24, 20) and basis.q_in.shape == (12, 12)
