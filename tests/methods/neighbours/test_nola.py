"""NOLA against its formula in float64, with the random matrices drawn in plain Python."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import NolaSettings

MATRICES, RANK, ALPHA = 7, 3, 5.0
MASK = (1 << 64) - 1


def split_mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def matrices(key: int, rows: int, columns: int) -> Tensor:
    """Return the random matrices of a key, (K, rows, columns)."""
    state = split_mix(key & MASK)
    count = MATRICES * rows * columns
    hashed = [split_mix((state + n * 0x9E3779B97F4A7C15) & MASK) for n in range(1, count + 1)]
    drawn = torch.tensor([(h >> 40) / 2**23 - 1 for h in hashed], dtype=torch.float64)
    scaled: Tensor = drawn.view(MATRICES, rows, columns) / MATRICES**0.5
    return scaled


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(NolaSettings(name="nola", rank=RANK, matrices=MATRICES, alpha=ALPHA))
    key = (3 << 16) + 0  # the seed is 3, and the target the first
    bs_KOR, as_KRI = matrices(key, one.out, RANK), matrices(~key, RANK, one.inn)
    assert bs_KOR.abs().max() < 1 / MATRICES**0.5 and abs(float(bs_KOR.mean())) < 0.1

    def factors(p: Parameters) -> tuple[Tensor, Tensor]:
        b_OR = sum(p["b"][k] * bs_KOR[k] for k in range(MATRICES))
        a_RI = sum(p["a"][k] * as_KRI[k] for k in range(MATRICES))
        assert isinstance(b_OR, Tensor) and isinstance(a_RI, Tensor)
        return b_OR, a_RI

    def delta_OI(p: Parameters) -> Tensor:
        b_OR, a_RI = factors(p)
        return ALPHA / RANK * b_OR @ a_RI

    def pull(p: Parameters, g_OI: Tensor) -> Parameters:
        b_OR, a_RI = factors(p)
        db_OR, da_RI = ALPHA / RANK * g_OI @ a_RI.T, ALPHA / RANK * b_OR.T @ g_OI
        return {
            "b": torch.stack([(db_OR * bs_KOR[k]).sum() for k in range(MATRICES)]),
            "a": torch.stack([(da_RI * as_KRI[k]).sum() for k in range(MATRICES)]),
        }

    assert not one.start["b"].any() and one.start["a"].any()
    check_steps(one, delta_OI, pull)
