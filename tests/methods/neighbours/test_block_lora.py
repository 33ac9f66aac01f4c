"""Block-LoRA against its formula in float64."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import BlockLoraSettings

BLOCKS, RANK, ALPHA = 3, 2, 5.0


def delta_OI(p: Parameters) -> Tensor:
    """Return alpha / r times [B_1 ... B_n] @ [A_s; ...; A_s], with the blocks written out."""
    b_OR = torch.cat([p["b"][n] for n in range(BLOCKS)], dim=1)
    a_RI = torch.cat([p["a"]] * BLOCKS, dim=0)
    return ALPHA / RANK * b_OR @ a_RI


def pull(p: Parameters, g_OI: Tensor) -> Parameters:
    scale = ALPHA / RANK
    return {
        "b": torch.stack([scale * g_OI @ p["a"].T] * BLOCKS),
        "a": scale * sum(p["b"][n].T @ g_OI for n in range(BLOCKS)),  # type: ignore[dict-item]
    }


def test_steps_are_those_of_the_formula() -> None:
    settings = BlockLoraSettings(name="block_lora", rank=RANK, blocks=BLOCKS, alpha=ALPHA)
    one = OneLayer(settings)
    assert not one.start["b"].any() and one.start["a"].any()
    check_steps(one, delta_OI, pull)
    assert torch.equal(one.layer.change.b[0], one.layer.change.b[2]), "the blocks stay equal"
