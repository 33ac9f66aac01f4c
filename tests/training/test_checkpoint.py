"""Checkpoints restore every state bit for bit, and damaged ones are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import checkpoint_files
from torch import nn

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.run.checkpoint_state import Progress, read_state
from sparsegrad_cli.training.checkpoint import load_optimizer, load_random

Schedule = torch.optim.lr_scheduler.LambdaLR


def training(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Schedule]:
    torch.manual_seed(seed)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.01)
    schedule = Schedule(optimizer, lambda n: 1 / (1 + n))
    return model, optimizer, schedule


def walk(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        schedule.step()


def save(folder: Path, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checkpoint_files.save(folder, weights, optimizer, schedule, best_step=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    parts = training()
    walk(*parts, 3)
    save(folder, *parts)
    return folder


def test_optimizer_and_schedule_continue_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, schedule = training()
    walk(model, optimizer, schedule, 3)
    save(tmp_path, model, optimizer, schedule)
    walk(model, optimizer, schedule, 4)
    other, second, second_schedule = training(seed=1)
    other.load_state_dict(read_tensors(tmp_path / "trainable.safetensors"))
    load_optimizer(tmp_path, second, second_schedule)
    group = second.param_groups[0]
    assert group["betas"] == (0.8, 0.95) and isinstance(group["betas"], tuple)
    assert group["lr"] == 0.1 / 4
    load_random(tmp_path)
    walk(other, second, second_schedule, 4)
    assert second_schedule.last_epoch == schedule.last_epoch == 7
    for got, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected)
        for key, value in optimizer.state[expected].items():
            assert torch.equal(second.state[got][key], value)


def test_optimizer_without_a_step_is_saved_and_restored(tmp_path: Path) -> None:
    parts = training()
    save(tmp_path, *parts)
    model, optimizer, schedule = training(seed=1)
    load_optimizer(tmp_path, optimizer, schedule)
    assert not optimizer.state
    walk(model, optimizer, schedule, 1)


def test_progress_is_restored(saved: Path) -> None:
    assert read_state(saved).progress == Progress(step=3, max_steps=9, best_step=2)


def draw() -> tuple[Any, ...]:
    """Draw enough from each generator to pass a block boundary, and to cache a Gaussian."""
    return (
        torch.rand(700).tolist(),
        torch.randn(3).tolist(),
        np.random.rand(700).tolist(),
        np.random.randn(3).tolist(),
        [random.random() for _ in range(700)],
        [random.gauss(0, 1) for _ in range(3)],
        random.getrandbits(64),
    )


def test_random_state_is_restored_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(6)
    random.seed(7)
    np.random.randn(1)  # an odd number of Gaussians: the second of the pair is cached
    random.gauss(0, 1)
    torch.randn(1)
    save(tmp_path, *training(seed=5))
    expected = draw()
    torch.rand(11)
    np.random.rand(11)
    random.random()
    load_random(tmp_path)
    assert draw() == expected


def test_saving_draws_no_random_numbers(tmp_path: Path) -> None:
    parts = training()
    state, python_state = torch.get_rng_state(), random.getstate()
    save(tmp_path, *parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_checkpoint_contains_no_pickle(saved: Path) -> None:
    names = sorted(p.name for p in saved.iterdir())
    assert names == [
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    json.loads((saved / "state.json").read_text())


# --- damaged files


@pytest.mark.parametrize("text", ["", "{", '{"format": 1', "[1]", '"x"', "\xff\xfe", "null"])
def test_damaged_state_json_is_refused(saved: Path, text: str) -> None:
    (saved / "state.json").write_bytes(text.encode("latin-1"))
    for read in (read_state, load_random, lambda f: load_optimizer(f, *training()[1:])):
        with pytest.raises(FileFormatError) as caught:
            read(saved)
        assert caught.value.where == str(saved / "state.json")


@pytest.mark.parametrize("key", ["optimizer_groups", "optimizer_numbers", "scheduler", "random"])
def test_incomplete_state_json_is_refused(saved: Path, key: str) -> None:
    content = json.loads((saved / "state.json").read_text())
    del content[key]
    (saved / "state.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=key):
        read_state(saved)


def test_state_json_of_another_format_is_refused(saved: Path) -> None:
    content = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(FileFormatError, match="has format 99; this version reads 1 and 2"):
        read_state(saved)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_tensors_are_refused(saved: Path, keep: int) -> None:
    for name in ("trainable", "optimizer", "random"):
        path = saved / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(FileFormatError) as caught:
            read_tensors(path)
        assert caught.value.where == str(path)
        assert "move it aside: --resume then uses an older checkpoint" in str(caught.value.fix)
    with pytest.raises(FileFormatError):
        load_optimizer(saved, *training()[1:])
    with pytest.raises(FileFormatError):
        load_random(saved)


def test_missing_files_are_refused(saved: Path) -> None:
    (saved / "optimizer.safetensors").unlink()
    with pytest.raises(FileFormatError):
        load_optimizer(saved, *training()[1:])
    (saved / "state.json").unlink()
    with pytest.raises(FileFormatError):
        read_state(saved)


def test_missing_random_tensors_are_refused(saved: Path) -> None:
    save_file({"torch": torch.get_rng_state()}, saved / "random.safetensors")
    state = torch.get_rng_state()
    with pytest.raises(FileFormatError):
        load_random(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_optimizer_state_of_other_parameters_is_refused(saved: Path) -> None:
    other = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    with pytest.raises(FileFormatError, match="does not fit"):
        load_optimizer(saved, optimizer, Schedule(optimizer, lambda n: 1.0))
