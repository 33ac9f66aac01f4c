"""DiffoRA: gates and factors in turn against a reference in float64, then the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoint_files import save
from support.one_layer import TRAIN, OneLayer, Parameters, ReferenceAdamW
from support.resumed_runs import resumed_run
from support.tiny_models import Tuned, batch, run_data, snapshot
from torch import Tensor

from sparsegrad_cli.io.atomic import read_tensors
from sparsegrad_cli.methods.implementation import load_by_name, trainable_state
from sparsegrad_cli.methods.neighbours.adaptive_settings import DifforaSettings
from sparsegrad_cli.methods.neighbours.diffora import DifforaChange
from sparsegrad_cli.training.checkpoint import load_optimizer

SCALE, SEARCH, STEPS = 4 / 3, 4, 8
SETTINGS = DifforaSettings(name="diffora", rank=3, alpha=4, search=SEARCH / STEPS)


def delta_OI(p: Parameters) -> Tensor:
    return p["gamma"] * SCALE * p["b"] @ p["a"]


def test_steps_are_those_of_the_formula() -> None:
    """Factors and gate in turn, then the factors alone with gamma in B."""
    one = OneLayer(SETTINGS, training=lambda one: run_data(one.model, STEPS))
    assert not one.start["b"].any() and one.start["a"].all() and not one.start["gate"].any()
    factors = ReferenceAdamW({n: one.start[n] for n in ("b", "a")})
    undecayed = TRAIN.model_copy(update={"weight_decay": 0.0})
    gate = ReferenceAdamW({"gate": one.start["gate"]}, undecayed)
    gamma = 1 / (1 + torch.exp(-gate.p["gate"]))
    for step in range(STEPS):
        p = {**factors.p, "gamma": gamma}
        g_OI = one.weight_gradient_OI(step, delta_OI(p))
        if step < SEARCH and step % 2:
            pulled = (g_OI * SCALE * (p["b"] @ p["a"])).sum() * gamma * (1 - gamma)
            gate.step({"gate": pulled})
            gamma = 1 / (1 + torch.exp(-gate.p["gate"]))
        else:
            pulled_b = gamma * SCALE * g_OI @ p["a"].T
            factors.step({"b": pulled_b, "a": gamma * SCALE * p["b"].T @ g_OI})
        if step == SEARCH - 1:
            assert abs(float(gamma) - 0.5) > 0.01
            before_OI = delta_OI({**factors.p, "gamma": gamma})
            factors.p["b"] = gamma * factors.p["b"]
            factors.m["b"], factors.v["b"] = factors.m["b"] / gamma, factors.v["b"] / gamma**2
            gamma = torch.ones(1, dtype=torch.float64)
            torch.testing.assert_close(delta_OI({**factors.p, "gamma": gamma}), before_OI)
    one.steps(STEPS)
    found = one.parameters()
    for name in ("b", "a"):
        torch.testing.assert_close(found[name], factors.p[name], rtol=1e-9, atol=1e-11)
    expected_OI = one.weight_OI + delta_OI({**factors.p, "gamma": gamma})
    torch.testing.assert_close(one.method.merged_OI(one.model, one.target), expected_OI)


def gates(tuned: Tuned) -> list[float]:
    found = [module for module in tuned.model.modules() if isinstance(module, DifforaChange)]
    return [float(torch.sigmoid(change.gate.detach())) for change in found]


def trained(tuned: Tuned, numbers: range) -> None:
    tuned.model.train()
    for number in numbers:
        tuned.step(batch(seed=1000 + number))


def test_the_targets_with_the_largest_gates_go_on_alone() -> None:
    tuned = Tuned("diffora", run_steps=20)  # the search takes 4 of them
    assert "for the first 4 steps, then 3 of them" in tuned.prepared.counts.note
    trained(tuned, range(3))
    with torch.no_grad():
        for number, target in enumerate(tuned.targets):
            gate = tuned.model.get_parameter(f"{target.name}.change.gate")
            gate.fill_((number % 3) - 1.0)
    trained(tuned, range(3, 4))
    kept = {n for n, gate in enumerate(gates(tuned)) if gate}
    assert kept in ({1, 2, 5}, {2, 4, 5}), "two gates were largest, and two next to them"
    assert set(gates(tuned)) == {0, 1}
    before = snapshot(tuned.model)
    trained(tuned, range(4, 7))
    after = snapshot(tuned.model)
    for number, target in enumerate(tuned.targets):
        names = [f"{target.name}.change.{part}" for part in ("a", "b")]
        for name in names:
            assert torch.equal(before[name], after[name]) != (number in kept)
        assert torch.equal(*(each[f"{target.name}.change.gate"] for each in (before, after)))


def test_what_is_exported_holds_the_factors_of_kept_targets_only() -> None:
    tuned, fresh = Tuned("diffora", run_steps=20), Tuned("diffora")
    trained(tuned, range(6))
    tensors = tuned.method.adapter_tensors(tuned.model)
    fresh.method.load_adapter(fresh.model, tensors)
    assert torch.equal(fresh.logits(), tuned.logits())
    for target, gate in zip(tuned.targets, gates(tuned), strict=True):
        factors = tuned.method.factors(tuned.model, target)
        assert factors.rank == (8 if gate else 1)
        weight_OI = target.weight_OI(tuned.model).detach().double()
        change_OI = tuned.method.merged_OI(tuned.model, target) - weight_OI
        torch.testing.assert_close(factors.product_OI(), change_OI)


def test_gates_do_not_move_in_the_steps_of_the_factors_nor_the_reverse() -> None:
    tuned = Tuned("diffora", scope="rest", run_steps=20)
    for step in range(3):
        before = snapshot(tuned.model)
        trained(tuned, range(step, step + 1))
        after = snapshot(tuned.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        gate_names = {name for name in before if name.endswith(".gate")}
        assert moved and (moved <= gate_names if step % 2 else not moved & gate_names)


def test_a_run_that_gets_more_steps_keeps_its_choice(tmp_path: Path) -> None:
    tuned, longer = Tuned("diffora", run_steps=10), Tuned("diffora", run_steps=60)
    trained(tuned, range(3))  # the search took 2 steps; of 60 it would take 12
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(t.optimizer, lambda n: 1) for t in (tuned, longer)
    ]
    save(tmp_path, trainable_state(tuned.model), tuned.optimizer, schedule[0])
    load_by_name(longer.model, read_tensors(tmp_path / "trainable.safetensors"))
    load_optimizer(tmp_path, longer.optimizer, schedule[1])
    trained(longer, range(3, 15))
    assert gates(longer) == gates(tuned) and sum(gates(longer)) == 3


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_a_resumed_run_is_bitwise_the_same(cut: int, tmp_path: Path) -> None:
    """Cut in the search, which takes 2 of 8 steps, where it ends, and after it."""
    whole, resumed = resumed_run("diffora", cut, tmp_path)
    assert gates(whole) == gates(resumed) and sum(gates(whole)) == 3
