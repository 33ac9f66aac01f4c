"""The choice of the examples of calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import base_folder, data_folder
from support.tiny_models import batch, classifier, one_thread
from torch import Tensor, nn

from sparsegrad_cli.calibration.basis_file import read_basis
from sparsegrad_cli.calibration.run_calibration import RunCalibration
from sparsegrad_cli.calibration.select_rows import CANDIDATES, body_features, representative
from sparsegrad_cli.errors import NonFiniteError
from sparsegrad_cli.models.unpadding import use_unpadding
from sparsegrad_cli.numerics.maxvol import rect_maxvol
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.setup import load, random_rows, training_batches

STEPS, SIZE = 2, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def padded() -> dict[str, Tensor]:
    """Return a batch whose second row has three tokens."""
    found = batch(size=2)
    found["attention_mask"][1, 3:] = 0
    return found


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the body's last hidden states, (B, L, hidden)."""
    body = model.get_submodule(str(model.base_model_prefix))
    with torch.no_grad():
        states: Tensor = body.eval()(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    return states


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_features_are_the_means_over_real_tokens(architecture: str) -> None:
    model = classifier(architecture).train()
    states, mode = hidden(model, padded()).double(), model.training
    model.train()
    found = body_features(model, [padded(), batch(size=3, seed=1)])
    assert found.shape == (5, states.shape[-1]) and found.dtype == torch.float64
    assert torch.allclose(found[0], states[0].mean(0), atol=1e-6)
    assert torch.allclose(found[1], states[1, :3].mean(0), atol=1e-6)
    assert mode and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_features_of_an_unpadded_classifier_are_those_of_the_token_that_it_reads() -> None:
    model = classifier("bert")
    first = hidden(model, padded())[:, 0].double()
    assert use_unpadding(model).first_only
    assert torch.allclose(body_features(model, [padded()]), first, atol=1e-6)


def test_features_that_are_not_finite_are_refused() -> None:
    model = classifier("bert")
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight")[:] = torch.nan
    with pytest.raises(NonFiniteError, match="hidden states of calibration examples"):
        body_features(model, [batch()])


def test_few_kinds_of_examples_are_all_chosen() -> None:
    kinds = torch.eye(3, 8, dtype=torch.float64)
    features = kinds[torch.tensor([0] * 20 + [1] * 5 + [2])]
    chosen = representative(features, 6)
    assert len(set(chosen)) == 6 and chosen == sorted(chosen)
    assert {features[number].argmax().item() for number in chosen} == {0, 1, 2}
    assert len(representative(torch.ones(9, 4, dtype=torch.float64), 5)) == 5


class Notes(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def step(self, phase: str, record: dict[str, Any]) -> None:
        if phase == "select":
            self.steps.append(record["step"])


def opened(folder: Path, *overrides: str) -> tuple[RunCalibration, Notes]:
    settings = (
        f"model={base_folder(folder / 'base')}",
        "task=csv",
        f"task.path={data_folder(folder / 'data')}",
        "task.max_length=16",
        "train.use_cpu=true",
        f"calibration.batch_size={SIZE}",
        f"calibration.steps={STEPS}",
        "calibration.select=maxvol",
        "calibration.warmup_steps=0",
        "method.density=0.05",
    )
    notes = Notes()
    run = Run(load_recipe(None, (*settings, *overrides)), RunWriter(folder), notes)
    return RunCalibration(run, load(run)), notes


def test_a_run_calibrates_on_the_rows_that_represent_the_others(tmp_path: Path) -> None:
    calibration, notes = opened(tmp_path)
    setup, seed = calibration.setup, calibration.run.recipe.seed
    candidates = random_rows(setup, seed)[: CANDIDATES * STEPS * SIZE]
    batches = list(training_batches(setup, candidates, SIZE))
    left = torch.linalg.svd(body_features(setup.model, batches), full_matrices=False).U
    expected = sorted(rect_maxvol(left[:, : STEPS * SIZE // 2], STEPS * SIZE).tolist())

    calibration.make_basis()
    assert calibration.choose_rows() == [candidates[number] for number in expected]
    assert calibration.choose_rows() != candidates[: STEPS * SIZE]
    read = [row for each in calibration.batches() for row in each["input_ids"]]
    assert len(read) == STEPS * SIZE
    assert notes.steps == list(range(1, len(batches) + 1))
    record = calibration.run.writer.record.calibration
    assert record is not None and record.select == "maxvol"
    assert read_basis(tmp_path / "basis.safetensors").metadata.settings.select == "maxvol"
    looked_at = sum(int(each["attention_mask"].sum()) for each in batches)
    chosen = sum(int(each["attention_mask"].sum()) for each in calibration.batches())
    assert record.tokens == looked_at + chosen


def test_a_smaller_trial_and_too_few_rows_need_no_choice(tmp_path: Path) -> None:
    calibration, notes = opened(tmp_path, "calibration.steps=40")
    assert len(next(calibration.batches(1))["input_ids"]) == 1 and not notes.told
    assert len(list(calibration.batches())) == 40
    rows = len(calibration.setup.train_data)
    assert f"calibration.select: all {rows} training rows are read" in notes.told
    assert sorted(set(calibration.choose_rows() or ())) == list(range(rows))
