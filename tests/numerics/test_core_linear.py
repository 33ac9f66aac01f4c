"""Output, gradients and saved tensors of the core layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad_cli.numerics.core_linear import core_linear, effective_weight, materializing_pays
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import rotated_linear, to_core

OUT, IN, R_OUT, R_IN = 7, 5, 4, 3


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q: Tensor = torch.linalg.qr(matrix).Q
    return q[:, :rank]


def parts(r_out: int = R_OUT, r_in: int = R_IN, *lead: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(*(lead or (6,)), IN),
        "weight_OI": normal(OUT, IN),
        "bias_O": normal(OUT),
        "core_RS": normal(r_out, r_in),
        "q_out_OR": orthonormal(OUT, r_out, g),
        "q_in_IS": orthonormal(IN, r_in, g),
    }


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("lead", [(6,), (2, 3), (1,), (0,)])
def test_output_is_the_formula(materialize: bool, lead: tuple[int, ...]) -> None:
    p = parts(R_OUT, R_IN, *lead)
    y = core_linear(**p, materialize=materialize)
    delta = p["q_out_OR"] @ p["core_RS"] @ p["q_in_IS"].T
    expected = p["x"] @ (p["weight_OI"] + delta).T + p["bias_O"]
    torch.testing.assert_close(y, expected)
    assert y.shape == (*lead, OUT)


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("wanted", [("x",), ("core_RS",), ("bias_O",), ("x", "core_RS", "bias_O")])
def test_gradients(materialize: bool, wanted: tuple[str, ...]) -> None:
    p = parts(R_OUT, R_IN, 2, 3)
    inputs = [p[name].requires_grad_() for name in wanted]

    def run(*values: Tensor) -> Tensor:
        given = dict(zip(wanted, values, strict=True))
        return core_linear(**(p | given), materialize=materialize)

    assert torch.autograd.gradcheck(run, inputs)


def test_core_gradient_equals_the_rotated_weight_gradient() -> None:
    p = parts()
    weight = p["weight_OI"].clone().requires_grad_()
    core = p["core_RS"].requires_grad_()
    loss_weights = torch.linspace(-1, 1, 6 * OUT, dtype=torch.float64).reshape(6, OUT)
    (core_linear(**p) * loss_weights).sum().backward()
    (torch.nn.functional.linear(p["x"], weight) * loss_weights).sum().backward()
    assert weight.grad is not None and core.grad is not None
    torch.testing.assert_close(core.grad, p["q_out_OR"].T @ weight.grad @ p["q_in_IS"])


def test_full_rank_core_is_the_layer_of_the_paper() -> None:
    p = parts(OUT, IN)
    basis = Basis(p["q_out_OR"], p["q_in_IS"], torch.ones(OUT), torch.ones(IN))
    papers_core = to_core(p["weight_OI"], basis) + p["core_RS"]
    expected = rotated_linear(p["x"], papers_core, p["bias_O"], basis)
    torch.testing.assert_close(core_linear(**p), expected)


@pytest.mark.parametrize("materialize", [False, True])
def test_zero_core_changes_nothing(materialize: bool) -> None:
    p = parts()
    p["core_RS"].zero_()
    plain = torch.nn.functional.linear(p["x"], p["weight_OI"], p["bias_O"])
    assert torch.equal(core_linear(**p, materialize=materialize), plain)


def saved_bytes(run: object) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()  # type: ignore[operator]
    return sum(kept.values())


@pytest.mark.parametrize("materialize", [False, True])
def test_only_the_rotated_input_is_saved(materialize: bool) -> None:
    tokens = 1000
    p = parts(R_OUT, R_IN, tokens)
    p["x"].requires_grad_()
    p["core_RS"].requires_grad_()
    frozen = sum(p[k].untyped_storage().nbytes() for k in ("weight_OI", "q_out_OR", "q_in_IS"))
    core = p["core_RS"].untyped_storage().nbytes()
    kept = saved_bytes(lambda: core_linear(**p, materialize=materialize))
    assert kept == tokens * R_IN * 8 + frozen + core


def test_input_without_gradient_costs_no_flops() -> None:
    p = parts()
    p["core_RS"].requires_grad_()
    y = core_linear(**p)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # h = g Q_out and dS = h' u; two flops a multiplication
    assert counter.get_total_flops() == 2 * (6 * OUT * R_OUT + R_OUT * 6 * R_IN)


def test_cheaper_form_is_chosen() -> None:
    shape = (1536, 384, 128, 128)
    assert not materializing_pays(64, *shape)
    assert materializing_pays(2048, *shape)
    p = parts(OUT, IN, 4096)
    p["x"].requires_grad_()
    flops = {}
    for way in (True, False, None):
        with FlopCounterMode(display=False) as counter:
            core_linear(**p, materialize=way).sum().backward()
        flops[way] = counter.get_total_flops()
    assert flops[None] == min(flops[True], flops[False]) == flops[True]


def test_autocast_products_are_half_and_gradients_float32() -> None:
    p = {name: tensor.float() for name, tensor in parts(R_OUT, R_IN, 2, 3).items()}
    core = p["core_RS"].requires_grad_()
    exact = core_linear(**p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = core_linear(**p)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.2)
    y.float().sum().backward()
    assert core.grad is not None and core.grad.dtype == torch.float32


def test_half_precision_increment_is_not_added_to_the_weight() -> None:
    # bfloat16 has an 8-bit mantissa: 1 + 1e-3 is 1, so a materialized weight would lose the core.
    weight, core = torch.ones(OUT, IN).bfloat16(), torch.full((1, 1), 1e-3)
    q_out, q_in = torch.zeros(OUT, 1), torch.zeros(IN, 1)
    q_out[0], q_in[0] = 1.0, 1.0
    x = torch.zeros(4096, IN).bfloat16()  # enough tokens to make materializing cheaper
    x[:, 0], x[:, 1] = 1.0, -1.0  # W x is exactly zero, so the output comes from the core
    assert materializing_pays(4096, OUT, IN, 1, 1)
    y = core_linear(x, weight, None, core, q_out, q_in)
    torch.testing.assert_close(y[:, 0].float(), torch.full((4096,), 1e-3), rtol=0.01, atol=0)
    lost = core_linear(x, weight, None, core, q_out, q_in, materialize=True)
    assert not lost.any()


def test_effective_weight() -> None:
    p = parts()
    built = effective_weight(p["weight_OI"], p["core_RS"], p["q_out_OR"], p["q_in_IS"])
    expected = p["weight_OI"] + p["q_out_OR"] @ p["core_RS"] @ p["q_in_IS"].T
    torch.testing.assert_close(built, expected)
