"""A linear layer with a diagonal beside it equals one with a core that is diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.diagonal_linear import diagonal_linear

OUT, IN, R = 7, 5, 3


def parts(*lead: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (*lead, IN),
        "weight_OI": (OUT, IN),
        "bias_O": (OUT,),
        "d_R": (R,),
        "q_out_OR": (OUT, R),
        "q_in_IR": (IN, R),
    }
    return {n: torch.randn(*s, generator=g, dtype=torch.float64) for n, s in shapes.items()}


def test_it_equals_a_diagonal_core_in_value_and_gradients() -> None:
    p = parts(2, 3)
    wanted = [p[name].requires_grad_() for name in ("x", "bias_O", "d_R")]
    found = diagonal_linear(**p)
    core = {n: t for n, t in p.items() if n not in ("d_R", "q_in_IR")}
    expected = core_linear(
        **core, core_RS=torch.diag(p["d_R"]), q_in_IS=p["q_in_IR"], materialize=False
    )
    torch.testing.assert_close(found, expected)
    g = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, g), torch.autograd.grad(expected, wanted, g)
    )
    assert torch.autograd.gradcheck(lambda *v: diagonal_linear(**{**p, **named(v)}), wanted)


def named(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("x", "bias_O", "d_R"), values, strict=True))


def test_a_packed_weight_is_unpacked_for_the_backward_pass_alone() -> None:
    p = parts(4)
    weight, bias = p.pop("weight_OI"), p.pop("bias_O")
    unpacked: list[int] = []

    def unpack() -> Tensor:
        unpacked.append(1)
        found: Tensor = weight
        return found

    p["x"].requires_grad_()
    y = diagonal_linear(
        **p,
        weight_OI=None,
        bias_O=None,
        product=lambda flat: F.linear(flat, weight, bias),
        unpacked=unpack,
    )
    torch.testing.assert_close(y, diagonal_linear(**p, weight_OI=weight, bias_O=bias))
    assert not unpacked
    (dx,) = torch.autograd.grad(y.sum(), [p["x"]])
    by_hand = torch.ones(4, OUT, dtype=torch.float64) @ (
        weight + p["q_out_OR"] @ torch.diag(p["d_R"]) @ p["q_in_IR"].T
    )
    torch.testing.assert_close(dx, by_hand)
    assert len(unpacked) == 1


def test_only_the_narrow_input_is_saved() -> None:
    p = parts(64)
    p["x"].requires_grad_()
    p["d_R"].requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        diagonal_linear(**p)
    assert sorted(kept) == sorted([(64, R), (OUT, IN), (R,), (OUT, R), (IN, R)])
