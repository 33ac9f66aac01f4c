"""FLoRA against its formula in float64."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import FloraSettings

SCALE = 0.7


def delta_OI(p: Parameters) -> Tensor:
    return SCALE * torch.einsum("or,rs,si->oi", p["b"], p["g"], p["a"])


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    return {
        "b": SCALE * g_OI @ (p["g"] @ p["a"]).T,
        "g": SCALE * p["b"].T @ g_OI @ p["a"].T,
        "a": SCALE * (p["b"] @ p["g"]).T @ g_OI,
    }


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(FloraSettings(name="flora", rank=3, scale=SCALE))
    assert not one.start["g"].any() and one.start["a"].any() and one.start["b"].any()
    check_steps(one, delta_OI, pull)
