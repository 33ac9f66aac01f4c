"""SaRA against its formula in float64: AdamW entry by entry, with numpy's singular vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.one_layer import OneLayer, drawn
from support.resumed_runs import resumed_run
from support.tiny_models import Tuned, run_data
from torch import Tensor

from sparsegrad_cli.methods.neighbours.adaptive_settings import SaraSettings
from sparsegrad_cli.methods.neighbours.sara import SaraChange, nuclear_subgradient
from sparsegrad_cli.recipe.schema import TrainSection

COUNT, PENALTY, STEPS = 12, 0.2, 6
SETTINGS = SaraSettings(name="sara", density=0.4, rank_weight=PENALTY)
TRAIN = TrainSection(learning_rate=0.15, weight_decay=0.1)  # some weights grow past theta


def one_layer(steps: int) -> OneLayer:
    return OneLayer(SETTINGS, training=lambda one: run_data(one.model, steps), train=TRAIN)


class Reference:
    """The weights that train, each with the moments of AdamW of its own."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight, self.columns = weight_OI.numpy(), weight_OI.shape[1]
        flat = self.weight.reshape(-1)
        self.chosen = sorted(sorted(range(len(flat)), key=lambda n: abs(flat[n]))[:COUNT])
        self.theta = max(abs(flat[n]) for n in self.chosen)
        self.value = dict.fromkeys(self.chosen, 0.0)
        self.moments = dict.fromkeys(self.chosen, (0.0, 0.0, 0))
        self.active = set(self.chosen)

    def place(self, n: int) -> tuple[int, int]:
        return divmod(n, self.columns)

    def delta_OI(self) -> Tensor:
        delta = np.zeros_like(self.weight)
        for n, value in self.value.items():
            delta[self.place(n)] = value
        return torch.from_numpy(delta)

    def step(self, g_OI: Tensor) -> None:
        masked = np.zeros_like(self.weight)
        for n in self.chosen:
            masked[self.place(n)] = self.weight[self.place(n)] + self.value[n]
        u, _, v = np.linalg.svd(masked, full_matrices=False)
        total = g_OI.numpy() + PENALTY * u @ v
        b1, b2 = TRAIN.adam_beta1, TRAIN.adam_beta2
        for n in self.active:
            m, s, t = self.moments[n]
            g = total[self.place(n)]
            m, s, t = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g * g, t + 1
            self.moments[n] = (m, s, t)
            move = m / (1 - b1**t) / ((s / (1 - b2**t)) ** 0.5 + TRAIN.adam_epsilon)
            decay = TRAIN.weight_decay * self.value[n]
            self.value[n] -= TRAIN.learning_rate * (move + decay)

    def reselect(self) -> None:
        flat = self.weight.reshape(-1)
        self.active = {n for n in self.active if abs(flat[n] + self.value[n]) <= self.theta}


def test_steps_are_those_of_the_formula() -> None:
    one = one_layer(STEPS)
    reference = Reference(one.weight_OI)
    for step in range(STEPS):
        reference.step(one.weight_gradient_OI(step, reference.delta_OI()))
        if step == 2:
            reference.reselect()
    assert 0 < len(reference.active) < COUNT
    one.steps(STEPS)
    change = one.layer.change
    assert change.positions.tolist() == reference.chosen
    expected = torch.tensor(list(reference.value.values()), dtype=torch.float64)
    torch.testing.assert_close(change.values.detach(), expected, rtol=1e-7, atol=1e-9)
    merged_OI = one.method.merged_OI(one.model, one.target)
    torch.testing.assert_close(merged_OI, one.weight_OI + reference.delta_OI())
    assert one.method.factors(one.model, one.target) is None


def test_only_weights_that_are_still_small_train_in_the_second_half() -> None:
    one = one_layer(20)
    change = one.layer.change
    one.steps(10)
    small = change.trained_values().abs() <= change.start().abs().max()
    before = change.values.detach().clone()
    one.steps(3)
    moved = change.values.detach() != before
    assert 0 < int(small.sum()) < COUNT and torch.equal(moved, small)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("rank", [2, 9])
def test_subgradient_of_the_nuclear_norm(shape: tuple[int, int], rank: int) -> None:
    matrix = drawn(shape[0], rank, seed=1) @ drawn(rank, shape[1], seed=2)
    u, s, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    kept = min(rank, *shape)
    expected = torch.from_numpy(u[:, :kept] @ v[:kept])
    found = nuclear_subgradient(matrix)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert float((found * matrix).sum()) == pytest.approx(s.sum())
    if rank > min(shape):  # full rank: the norm has a gradient
        numeric = torch.autograd.functional.jacobian(
            lambda m: torch.linalg.matrix_norm(m, "nuc"), matrix
        )
        torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-7)
    assert not nuclear_subgradient(torch.zeros(shape, dtype=torch.float64)).any()


@pytest.mark.parametrize("cut", [2, 6])
def test_a_resumed_run_is_bitwise_the_same(cut: int, tmp_path: Path) -> None:
    """Cut before and after the second choice, at step 4 of 8."""
    whole, resumed = resumed_run("sara", cut, tmp_path)
    assert 0 < sum(int(a.sum()) for a in actives(whole)) < sum(a.numel() for a in actives(whole))
    assert all(map(torch.equal, actives(whole), actives(resumed)))


def actives(tuned: Tuned) -> list[Tensor]:
    changes = [module for module in tuned.model.modules() if isinstance(module, SaraChange)]
    return [tuned.optimizer.state[change.values]["active"] for change in changes]


def test_an_adapter_does_not_depend_on_how_its_positions_were_chosen() -> None:
    tuned, fresh = Tuned("sara"), Tuned("sara", seed=3)
    tuned.steps(3)
    tensors = tuned.method.adapter_tensors(tuned.model)
    fresh.method.load_adapter(fresh.model, tensors)
    name = tuned.targets[0].name
    found: list[Any] = [t.model.get_submodule(name).change for t in (tuned, fresh)]
    assert torch.equal(found[0].positions, found[1].positions)
    assert torch.equal(found[0].delta_OI(), found[1].delta_OI())
    key = f"{name}.change.positions"
    with pytest.raises(ValueError, match="ascend"):
        fresh.method.load_adapter(fresh.model, {**tensors, key: tensors[key].flip(0)})


def test_gradients_are_kept_at_the_chosen_weights_alone() -> None:
    tuned = Tuned("sara")
    tuned.steps(1)
    kept = sum(p.grad.numel() for p in tuned.model.parameters() if p.grad is not None)
    head = tuned.prepared.counts.trainable_head
    assert kept == tuned.prepared.counts.trainable_targets + head
