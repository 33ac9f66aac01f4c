"""MoRe against its formula in float64, entry by entry."""

from __future__ import annotations

import pytest
import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import MonarchSettings


@pytest.mark.parametrize(("blocks", "rank"), [(3, 2), (2, 3), (4, 1)])
def test_steps_are_those_of_the_formula(blocks: int, rank: int) -> None:
    one = OneLayer(MonarchSettings(name="monarch", blocks=blocks, rank=rank))
    columns = -(-one.inn // blocks)

    def delta_OI(p: Parameters) -> Tensor:
        rows = []
        for o in range(one.out):
            to, at = o % blocks, o // blocks  # output o is number ``at`` of block ``to`` of L
            row = [torch.zeros((), dtype=torch.float64)] * one.inn
            for t in range(rank):
                between = to + t * blocks  # what that block reads as its number t
                of, number = divmod(between, rank)
                for i in range(of * columns, min(one.inn, (of + 1) * columns)):
                    more = p["l"][to, at, t] * p["r"][of, number, i - of * columns]
                    row[i] = row[i] + more
            rows.append(torch.stack(row))
        return torch.stack(rows)

    assert not one.start["l"].any() and one.start["r"].any()
    check_steps(one, delta_OI)
