"""Optimizer state of newly chosen entries after a refresh equals a formula in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW

ROWS, COLUMNS, COUNT, REFRESH = 5, 6, 7, 4
LR, BETA1, BETA2, EPS, DECAY = 0.05, 0.8, 0.97, 1e-8, 0.1


def gradient(step: int) -> Tensor:
    """Return the gradient of a step (from 1); the largest entries change over time."""
    draw = torch.Generator().manual_seed(step)
    noise = torch.randn(ROWS, COLUMNS, generator=draw, dtype=torch.float64)
    at = torch.arange(ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
    return noise * (1 + 5 * torch.cos(at + step / 3).clamp_min(0))


def made(capacity: int | None) -> tuple[nn.Parameter, SelectiveAdamW]:
    core = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    first = torch.arange(COUNT)
    selection = Selection(COUNT, capacity=capacity, refresh=REFRESH, first=first)
    settings: dict[str, Any] = {"betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    return core, SelectiveAdamW([core], {core: selection}, lr=LR, **settings)


def by_the_formula(steps: int) -> list[float]:
    """Compute one entry at a time in plain Python.

    An entry chosen at step t starts with first moment 0, second moment a^2 (1 - beta2^(t-1)),
    where a is its mean |gradient| since the last choice, and age t - 1.
    """
    size = ROWS * COLUMNS
    value, state = [0.0] * size, dict.fromkeys(range(COUNT), (0.0, 0.0, 0))
    total = [0.0] * size
    for step in range(1, steps + 1):
        if step > 1 and (step - 1) % REFRESH == 0:
            held = sorted(range(size), key=lambda i: -total[i])[:COUNT]
            means = [total[i] / REFRESH for i in range(size)]
            joined = {
                i: (0.0, means[i] ** 2 * (1 - BETA2 ** (step - 1)), step - 1)
                for i in held
                if i not in state
            }
            state = {i: moments for i, moments in state.items() if i in held} | joined
            total = [0.0] * size
        grad = gradient(step).reshape(-1).tolist()
        total = [t + abs(g) for t, g in zip(total, grad, strict=True)]
        for i, (first, second, age) in state.items():
            first = BETA1 * first + (1 - BETA1) * grad[i]
            second = BETA2 * second + (1 - BETA2) * grad[i] ** 2
            state[i] = first, second, age + 1
            unbiased = first / (1 - BETA1 ** (age + 1))
            scale = math.sqrt(second / (1 - BETA2 ** (age + 1))) + EPS
            value[i] -= LR * unbiased / scale + LR * DECAY * value[i]
    return value


def run(core: nn.Parameter, optimizer: SelectiveAdamW, steps: range) -> None:
    for step in steps:
        core.grad = gradient(step)
        optimizer.step()


@pytest.mark.parametrize("steps", [REFRESH, REFRESH + 1, 3 * REFRESH, 5 * REFRESH + 2])
def test_steps_equal_the_formula(steps: int) -> None:
    core, optimizer = made(COUNT)
    run(core, optimizer, range(1, steps + 1))
    expected = torch.tensor(by_the_formula(steps), dtype=torch.float64)
    torch.testing.assert_close(core.detach().view(-1), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("capacity", [COUNT, None])
def test_new_entries_start_below_the_learning_rate(capacity: int | None) -> None:
    core, optimizer = made(capacity)
    steps = []
    for turn in range(6):
        run(core, optimizer, range(1 + turn * REFRESH, 1 + (turn + 1) * REFRESH))
        before = core.detach().clone()
        seen = set(optimizer.touched(core).tolist())
        run(core, optimizer, range(1 + (turn + 1) * REFRESH, 2 + (turn + 1) * REFRESH))
        new = sorted(set(optimizer.touched(core).tolist()) - seen)
        steps += [float((core - before).detach().view(-1)[i]) / LR for i in new]
        core, optimizer = (core, optimizer) if turn % 2 else made(capacity)
    assert len(steps) > 5
    assert not any(abs(abs(step) - 1) < 1e-6 for step in steps)
    assert sum(abs(step) for step in steps) / len(steps) < 0.7


@pytest.mark.parametrize("at", [REFRESH - 1, REFRESH, REFRESH + 1])
def test_state_survives_a_refresh(at: int) -> None:
    core, optimizer = made(COUNT)
    run(core, optimizer, range(1, at + 1))
    again, resumed = made(COUNT)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.data.copy_(core.data)
    for one, own in ((core, optimizer), (again, resumed)):
        run(one, own, range(at + 1, 3 * REFRESH))
    assert torch.equal(core, again)


def test_entry_without_gradient_starts_at_age_zero() -> None:
    core = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))
    selection = Selection(2, capacity=2, refresh=1, first=torch.tensor([0, 1]))
    optimizer = SelectiveAdamW([core], {core: selection}, lr=LR)
    core.grad = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    optimizer.step()
    core.grad = torch.tensor([[3.0, 3.0, 2.0]], dtype=torch.float64)
    optimizer.step()
    moved = core.detach()[0, 2] / LR
    assert float(moved) == pytest.approx(
        -0.1 * 2 / 0.19 / ((0.999 * 0.001 + 0.004) / 0.001999) ** 0.5
    )
