"""A calibration step in parts: the sums of the whole batch, and half of its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny_models import (
    VOCABULARY,
    batch,
    build,
    classifier,
    config,
    found_by,
    one_thread,
    targets_of,
)
from torch import Tensor, nn

from sparsegrad_cli.calibration import calibrate as calibration
from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.calibration.gradients import micro_batches
from sparsegrad_cli.memory.meter import MemoryMeter
from sparsegrad_cli.models.lm_loss import use_lm_loss
from sparsegrad_cli.recipe.schema import CalibrationSection

DROPLESS: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = CalibrationSection(steps=1, source="token", score="square")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """``sums(model, batch, 2)``: Grams and scores of a step in two parts, and its loss."""

    def find(model: nn.Module, one: dict[str, Tensor], parts: int) -> dict[str, Tensor]:
        monkeypatch.setattr(calibration, "_PARTS", parts)
        targets = targets_of(model)
        found = found_by(model, targets, lambda: iter([one]), SETTINGS, seed=0, rank=4)
        sums = {f"score {name}": score for name, score in found.scores.items()}
        for name, stream in found.streams.items():
            sums |= {f"{name} {side}": total for side, total in enumerate(stream.sums())}
        return sums | {"losses": torch.tensor(found.losses)}

    return find


def talk() -> tuple[nn.Module, dict[str, Tensor]]:
    """A causal model, and five rows of which each has another number of labels."""
    from transformers import AutoModelForCausalLM

    model = build(AutoModelForCausalLM, config("llama"))
    use_lm_loss(model)
    ids = torch.randint(3, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, first in enumerate((1, 8, 5, 7, 3)):
        labels[row, :first] = -100
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def texts() -> tuple[nn.Module, dict[str, Tensor]]:
    return classifier(**DROPLESS), batch(size=7)


@pytest.mark.parametrize("make", [talk, texts])
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_add_up_to_the_whole(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]],
    parts: int,
    sums: Callable[..., dict[str, Tensor]],
) -> None:
    model, one = make()
    whole, cut = sums(model, one, 1), sums(model, one, parts)
    assert whole.keys() == cut.keys() and len(whole) > 8
    for key, tensor in whole.items():
        if key.startswith("score"):  # in bases that are known to their signs alone, as squares are
            torch.testing.assert_close(cut[key], tensor, rtol=2e-3, atol=1e-3 * float(tensor.max()))
        else:
            torch.testing.assert_close(
                cut[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())
            )


def test_two_parts_take_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for parts in (1, 2):
        monkeypatch.setattr(calibration, "_PARTS", parts)
        model, meter = classifier(**DROPLESS), MemoryMeter()
        meter.watch(model)
        one = batch(size=64, length=30)
        settings = CalibrationSection(steps=1, source="token")

        def measured(meter: MemoryMeter = meter) -> Any:
            return meter.phase("calibrate")

        calibrate(model, targets_of(model), partial(iter, [one]), settings, seed=0, meter=measured)
        found = meter.report().to_json()["phases"]["calibrate"]
        peaks.append(found["peak_bytes"] - found["categories"]["weights"])
    assert 0.45 < peaks[1] / peaks[0] < 0.6


def test_a_batch_that_cannot_be_cut_stays_whole() -> None:
    one = batch(size=4)
    for whole in (
        batch(size=1),
        {key: tensor for key, tensor in one.items() if key != "labels"},
        one | {"offsets": torch.arange(3)},
        one | {"kind": "text"},
    ):
        assert micro_batches(whole, 2) == [(whole, 1.0)]
    assert micro_batches(one, 1) == [(one, 1.0)]


def test_shares_are_of_rows() -> None:
    parts = micro_batches(batch(size=7), 2)
    assert [share for _, share in parts] == [4 / 7, 3 / 7]
    assert torch.equal(torch.cat([part["labels"] for part, _ in parts]), batch(size=7)["labels"])
