"""SVFit against its formula in float64."""

from __future__ import annotations

import torch
from support.one_layer import OneLayer, Parameters, check_steps
from torch import Tensor

from sparsegrad_cli.methods.neighbours.change_settings import SvfitSettings

RANK = 3


def test_steps_are_those_of_the_formula() -> None:
    one = OneLayer(SvfitSettings(name="svfit", rank=RANK))
    # By the eigenvectors of W'W, where the method decomposes W.
    squares, vectors = torch.linalg.eigh(one.weight_OI.T @ one.weight_OI)
    v_IR = vectors.flip(1)[:, :RANK]
    values_R = squares.flip(0)[:RANK].sqrt()
    u_OR = one.weight_OI @ v_IR / values_R

    def delta_OI(p: Parameters) -> Tensor:
        """Return U_r S_r V_r' with trained values, minus the same with W's own."""
        trained = u_OR @ torch.diag(values_R + p["d"]) @ v_IR.T
        change_OI: Tensor = trained - u_OR @ torch.diag(values_R) @ v_IR.T
        return change_OI

    def pull(p: Parameters, g_OI: Tensor) -> Parameters:
        return {"d": torch.stack([u_OR[:, i] @ g_OI @ v_IR[:, i] for i in range(RANK)])}

    check_steps(one, delta_OI, pull)


def test_at_full_rank_all_singular_values_train() -> None:
    one = OneLayer(SvfitSettings(name="svfit"))
    assert one.prepared.counts.trainable_targets == min(one.out, one.inn)
    assert one.prepared.counts.note == "rank 5"
    beyond = OneLayer(SvfitSettings(name="svfit", rank=9)).prepared.counts
    assert (beyond.trainable_targets, beyond.note) == (
        5,
        "rank 9, of which no layer has more than 5",
    )
    asked = OneLayer(SvfitSettings(name="svfit", density=0.9)).prepared.counts
    assert (asked.requested, asked.note) == (27, "rank 5, the largest there is")
    one.steps(2)
    change_OI = one.method.merged_OI(one.model, one.target) - one.weight_OI
    u_OK, _, v_KI = torch.linalg.svd(one.weight_OI, full_matrices=False)
    core_KK = u_OK.T @ change_OI @ v_KI.T
    torch.testing.assert_close(core_KK, torch.diag(core_KK.diag()), atol=1e-12, rtol=0)
