"""SoRA against its formula in float64: AdamW, then the soft threshold on the gate."""

from __future__ import annotations

from typing import Any

import torch
from support.one_layer import TRAIN, OneLayer, Parameters, ReferenceAdamW
from torch import Tensor

from sparsegrad_cli.methods.neighbours.adaptive_settings import SoraSettings
from sparsegrad_cli.methods.neighbours.sora import soft_threshold_

SCALE = 4 / 3  # alpha / rank
THRESHOLD = 0.02
SETTINGS = SoraSettings(name="sora", rank=3, alpha=4, threshold=THRESHOLD)


def delta_OI(p: Parameters) -> Tensor:
    return SCALE * torch.einsum("or,r,ri->oi", p["b"], p["gate"], p["a"])


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    gate = torch.diag(p["gate"])
    return {
        "b": SCALE * g_OI @ (gate @ p["a"]).T,
        "gate": SCALE * (p["b"].T @ g_OI @ p["a"].T).diagonal(),
        "a": SCALE * (p["b"] @ gate).T @ g_OI,
    }


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(SETTINGS)
    assert not one.start["b"].any() and one.start["a"].all() and one.start["gate"].all()
    undecayed = TRAIN.model_copy(update={"weight_decay": 0.0})
    factors = ReferenceAdamW({n: one.start[n] for n in ("b", "a")})
    gates = ReferenceAdamW({"gate": one.start["gate"]}, undecayed)
    for step in range(5):
        p = {**factors.p, **gates.p}
        found = pull(p, one.weight_gradient_OI(step, delta_OI(p)))
        factors.step({n: found[n] for n in ("b", "a")})
        gates.step({"gate": found["gate"]})
        shrunk = [
            0.0 if abs(v) <= THRESHOLD else v - THRESHOLD if v > 0 else v + THRESHOLD
            for v in gates.p["gate"].tolist()
        ]
        gates.p["gate"] = torch.tensor(shrunk, dtype=torch.float64)
    one.steps(5)
    expected = {**factors.p, **gates.p}
    for name, parameter in one.parameters().items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-11)
    merged_OI = one.method.merged_OI(one.model, one.target)
    torch.testing.assert_close(merged_OI, one.weight_OI + delta_OI(expected))


def test_ranks_whose_gate_is_zero_leave_the_exported_adapter() -> None:
    one = OneLayer(SETTINGS)
    one.steps(3)
    with torch.no_grad():
        one.layer.change.gate[1] = 0
    factors: Any = one.method.factors(one.model, one.target)
    change_OI = one.method.merged_OI(one.model, one.target) - one.weight_OI
    assert factors.rank == 2
    torch.testing.assert_close(factors.product_OI(), change_OI)
    with torch.no_grad():
        one.layer.change.gate.zero_()
    factors = one.method.factors(one.model, one.target)
    assert factors.rank == 1 and not factors.product_OI().any()


def test_a_gate_reaches_zero_and_can_come_back() -> None:
    values = torch.tensor([0.5, -0.5, 0.01, -0.02, 0.0])
    expected = torch.tensor([0.48, -0.48, 0.0, 0.0, 0.0])
    torch.testing.assert_close(soft_threshold_(values, 0.02), expected)
    one = OneLayer(SETTINGS)
    one.steps(3)
    with torch.no_grad():
        one.layer.change.gate[0] = 0
    one.steps(3)
    assert one.layer.change.gate[0] != 0
