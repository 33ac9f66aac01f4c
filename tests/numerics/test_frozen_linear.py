"""A frozen linear map with a separate core equals the fused core layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.frozen_linear import core_beside, frozen_linear

OUT, IN, R_OUT, R_IN = 7, 5, 4, 3


def parts(*lead: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def orthonormal(size: int, rank: int) -> Tensor:
        q: Tensor = torch.linalg.qr(normal(size, size)).Q
        return q[:, :rank]

    return {
        "x": normal(*lead, IN),
        "weight_OI": normal(OUT, IN),
        "bias_O": normal(OUT),
        "core_RS": normal(R_OUT, R_IN),
        "q_out_OR": orthonormal(OUT, R_OUT),
        "q_in_IS": orthonormal(IN, R_IN),
    }


def apart(p: dict[str, Tensor]) -> Tensor:
    """Compute the layer as for quantized weights: W in a function, the core separate."""
    weight, bias = p["weight_OI"], p["bias_O"]

    def base(x: Tensor) -> Tensor:
        return frozen_linear(x, lambda flat: F.linear(flat, weight, bias), lambda: weight)

    return core_beside(p["x"], base, p["core_RS"], p["q_out_OR"], p["q_in_IS"])


@pytest.mark.parametrize("lead", [(6,), (2, 3), (1,), (0,)])
def test_frozen_linear_equals_the_core_layer(lead: tuple[int, ...]) -> None:
    p = parts(*lead)
    wanted = [p["x"].requires_grad_(), p["core_RS"].requires_grad_()]
    one, other = apart(p), core_linear(**p, materialize=False)
    torch.testing.assert_close(one, other)
    g = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(one, wanted, g)
    torch.testing.assert_close(found, torch.autograd.grad(other, wanted, g))
    x_NI, g_NO = p["x"].detach().reshape(-1, IN), g.reshape(-1, OUT)
    by_hand = (g_NO @ p["q_out_OR"]).T @ (x_NI @ p["q_in_IS"])
    torch.testing.assert_close(found[1], by_hand)


@pytest.mark.parametrize("wanted", [("x",), ("core_RS",), ("x", "core_RS")])
def test_gradients(wanted: tuple[str, ...]) -> None:
    p = parts(2, 3)
    inputs = [p[name].requires_grad_() for name in wanted]

    def run(*values: Tensor) -> Tensor:
        return apart(p | dict(zip(wanted, values, strict=True)))

    assert torch.autograd.gradcheck(run, inputs)


def test_only_the_narrow_input_and_the_core_are_saved() -> None:
    p = parts(64)
    p["x"].requires_grad_()
    p["core_RS"].requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        apart(p)
    shapes = sorted(tuple(tensor.shape) for tensor in kept)
    assert shapes == sorted([(64, R_IN), (R_OUT, R_IN), (OUT, R_OUT), (IN, R_IN)])


def test_autocast_products_are_in_its_dtype() -> None:
    p = {name: tensor.float() for name, tensor in parts(6).items()}
    seen: list[torch.dtype] = []

    def product(flat: Tensor) -> Tensor:
        seen.append(flat.dtype)
        return F.linear(flat, p["weight_OI"].to(flat.dtype))

    x = p["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = core_beside(
            x,
            lambda flat: frozen_linear(flat, product, lambda: p["weight_OI"]),
            p["core_RS"],
            p["q_out_OR"],
            p["q_in_IS"],
        )
    assert seen == [torch.bfloat16] and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
