"""LoRA-SB against its formulas in float64."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import LoraSbSettings

RANK, RATE = 3, 0.01


def first_step(one: OneLayer) -> Tensor:
    """Return -lr sign(sum of the gradients at W), by hand."""
    zero = torch.zeros_like(one.weight_OI)
    total = one.weight_gradient_OI(0, zero) + one.weight_gradient_OI(1, zero)
    return -RATE * total.sign()


def test_it_starts_at_the_nearest_approximation_of_the_first_step() -> None:
    one = OneLayer(LoraSbSettings(name="lora_sb", rank=RANK, init_learning_rate=RATE))
    step_OI = first_step(one)
    change_OI = one.method.merged_OI(one.model, one.target) - one.weight_OI
    left = (step_OI - change_OI).square().sum()
    values = torch.linalg.eigvalsh(step_OI @ step_OI.T).flip(0)
    torch.testing.assert_close(left, values[RANK:].sum())  # Eckart and Young
    assert "after the first full step" in one.prepared.counts.note
    change = one.layer.change
    for side in (change.q_out, change.q_in):
        torch.testing.assert_close(side.T @ side, torch.eye(RANK, dtype=torch.float64))


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(LoraSbSettings(name="lora_sb", rank=RANK, init_learning_rate=RATE))
    # Singular vectors are unique up to signs: the method's, which the test above checks.
    b_OR, a_RI = one.layer.change.q_out.clone(), one.layer.change.q_in.T.clone()
    values = torch.linalg.eigvalsh(first_step(one).T @ first_step(one)).flip(0).sqrt()
    torch.testing.assert_close(one.start["r"], torch.diag(values[:RANK]))

    def delta_OI(p: Parameters) -> Tensor:
        change_OI: Tensor = b_OR @ p["r"] @ a_RI
        return change_OI

    def pull(p: Parameters, g_OI: Tensor) -> Parameters:
        return {"r": b_OR.T @ g_OI @ a_RI.T}

    check_steps(one, delta_OI, pull)


def test_gradients_are_found_though_all_parameters_are_frozen() -> None:
    """The hooks see the gradient of W itself: compare with autograd's."""
    one = OneLayer(LoraSbSettings(name="lora_sb", rank=RANK), transposed=True)
    other = OneLayer(LoraSbSettings(name="lora_sb", rank=RANK))
    merged = [o.method.merged_OI(o.model, o.target) for o in (one, other)]
    torch.testing.assert_close(*merged)
