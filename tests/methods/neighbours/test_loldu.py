"""LoLDU against its formula in float64, with the decomposition written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import LolduSettings

RANK, SCALE = 3, 0.6


def eliminated(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P (out, out), L (out, k), D (k,) and U (k, in) by Gaussian elimination."""
    out, inn = weight_OI.shape
    rest, rows = weight_OI.clone(), list(range(out))
    lower = torch.zeros(out, min(out, inn), dtype=torch.float64)
    for k in range(min(out, inn)):
        at = k + int(rest[k:, k].abs().argmax())
        for table in (rest, lower):
            table[[k, at]] = table[[at, k]]
        rows[k], rows[at] = rows[at], rows[k]
        lower[k, k] = 1
        for i in range(k + 1, out):
            lower[i, k] = rest[i, k] / rest[k, k]
            rest[i] = rest[i] - lower[i, k] * rest[k]
    upper = rest[: min(out, inn)]
    permutation = torch.zeros(out, out, dtype=torch.float64)
    for at, row in enumerate(rows):
        permutation[row, at] = 1
    return permutation, lower, upper.diagonal(), upper / upper.diagonal()[:, None]


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(LolduSettings(name="loldu", rank=RANK, scale=SCALE))
    p_OO, l_OK, d_K, u_KI = eliminated(one.weight_OI)
    torch.testing.assert_close(p_OO @ l_OK @ torch.diag(d_K) @ u_KI, one.weight_OI)
    assert not torch.equal(p_OO, torch.eye(one.out, dtype=torch.float64))

    def delta_OI(p: Parameters) -> Tensor:
        return SCALE * p_OO @ l_OK[:, :RANK] @ torch.diag(p["d"]) @ u_KI[:RANK]

    def pull(p: Parameters, g_OI: Tensor) -> Parameters:
        left = p_OO @ l_OK
        return {"d": torch.stack([SCALE * left[:, i] @ g_OI @ u_KI[i] for i in range(RANK)])}

    check_steps(one, delta_OI, pull)


def test_an_adapter_of_another_permutation_is_refused() -> None:
    one = OneLayer(LolduSettings(name="loldu", rank=RANK))
    tensors = one.method.adapter_tensors(one.model)
    tensors["layer.change.rows"] = tensors["layer.change.rows"].roll(1)
    with pytest.raises(ValueError, match="another P"):
        one.method.load_adapter(one.model, tensors)


def test_a_direction_that_weights_do_not_have_gets_no_gradient() -> None:
    layer = torch.nn.Linear(OneLayer.inn, OneLayer.out, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight)  # of rank 1
    model: Any = torch.nn.ModuleDict({"layer": layer})
    target = OneLayer(LolduSettings(name="loldu")).target
    LolduSettings(name="loldu").implementation().prepare(model, [target], scope="head")
    model["layer"](torch.ones(2, OneLayer.inn, dtype=torch.float64)).sum().backward()
    gradient = model["layer"].change.d.grad
    assert gradient[0] != 0 and not gradient[1:].any()
