"""Runs that are cut and resumed, which must end as the whole run does."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.implementation import load_by_name, trainable_state
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.training.checkpoint import load_optimizer, load_random
from support.checkpoint_files import save
from support.tiny_models import Tuned, batch, snapshot


def resumed_run(name: str, cut: int, folder: Path, steps: int = 8) -> tuple[Tuned, Tuned]:
    """Train whole, and cut after ``cut`` steps and resumed; check that both end bit for bit."""

    def fresh() -> tuple[Tuned, torch.optim.lr_scheduler.LambdaLR]:
        tuned = Tuned(name, scope="rest", run_steps=steps)
        tuned.model.train()
        return tuned, torch.optim.lr_scheduler.LambdaLR(tuned.optimizer, lambda n: 1 - n / 20)

    def run(tuned: Tuned, schedule: torch.optim.lr_scheduler.LambdaLR, numbers: range) -> None:
        for number in numbers:
            tuned.step(batch(seed=1000 + number))
            schedule.step()

    with temporary_seed(4):
        whole, schedule = fresh()
        run(whole, schedule, range(steps))
    with temporary_seed(4):
        first, schedule = fresh()
        run(first, schedule, range(cut))
        save(folder, trainable_state(first.model), first.optimizer, schedule)
    with temporary_seed(99):
        second, schedule = fresh()
        load_by_name(second.model, read_tensors(folder / "trainable.safetensors"))
        load_optimizer(folder, second.optimizer, schedule)
        load_random(folder)
        run(second, schedule, range(cut, steps))
    expected, got = snapshot(whole.model), snapshot(second.model)
    assert all(torch.equal(expected[n], got[n]) for n in expected)
    return whole, second
