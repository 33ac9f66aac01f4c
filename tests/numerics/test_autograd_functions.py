"""Compare every custom backward pass with plain autograd in float64, also for unusual inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.frozen_linear import adapter_linear, core_beside, frozen_linear
from sparsegrad_cli.numerics.linear_cross_entropy import linear_cross_entropy
from sparsegrad_cli.numerics.matrix_change import matrix_change_linear
from sparsegrad_cli.numerics.meprop import meprop_linear
from sparsegrad_cli.numerics.saved_activations import gated

OUT, IN, RANK = 5, 4, 3


def normal(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


W, B = normal(OUT, IN, seed=1), normal(OUT, seed=2)
Q_OUT, Q_IN = normal(OUT, RANK, seed=3), normal(IN, RANK, seed=4)


def _base(x: Tensor) -> Tensor:
    return frozen_linear(x, lambda flat: F.linear(flat, W, B), lambda: W)


def _core(x: Tensor, core: Tensor) -> Tensor:
    return F.linear(x, W, B) + ((x @ Q_IN) @ core.T) @ Q_OUT.T


def _change(u: Tensor, v: Tensor) -> Tensor:
    return u * u * v


# name -> (ours, by plain autograd, shapes of the inputs but for x's rows)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "core, side path": (
        lambda x, core, b: core_linear(x, W, b, core, Q_OUT, Q_IN, materialize=False),
        lambda x, core, b: _core(x, core) - B + b,
        [(IN,), (RANK, RANK), (OUT,)],
    ),
    "core, built weight": (
        lambda x, core, b: core_linear(x, W, b, core, Q_OUT, Q_IN, materialize=True),
        lambda x, core, b: _core(x, core) - B + b,
        [(IN,), (RANK, RANK), (OUT,)],
    ),
    "core beside": (
        lambda x, core: core_beside(x, _base, core, Q_OUT, Q_IN),
        _core,
        [(IN,), (RANK, RANK)],
    ),
    "adapter": (
        lambda x, bias, a, b: adapter_linear(x, W, bias, a, b, scaling=1.5),
        lambda x, bias, a, b: F.linear(x, W, bias) + 1.5 * (x @ a.T) @ b.T,
        [(IN,), (OUT,), (RANK, IN), (OUT, RANK)],
    ),
    "matrix change": (
        lambda x, b, u, v: matrix_change_linear(x, lambda: W, b, _change, u, v),
        lambda x, b, u, v: F.linear(x, W + _change(u, v), b),
        [(IN,), (OUT,), (OUT, IN), (OUT, 1)],
    ),
    "frozen": (_base, lambda x: F.linear(x, W, B), [(IN,)]),
    "meprop of all outputs": (
        lambda x, w, b: meprop_linear(x, w, b, k=OUT),
        F.linear,
        [(IN,), (OUT, IN), (OUT,)],
    ),
    "meprop unified": (
        lambda x, w, b: meprop_linear(x, w, b, k=OUT, unified=True),
        F.linear,
        [(IN,), (OUT, IN), (OUT,)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", ["(2, 3)", "strided", "empty", "one"])
def test_gradients_equal_plain_autograd(name: str, rows: str) -> None:
    ours, plain, (x_shape, *others) = FUNCTIONS[name]
    leading = {"(2, 3)": (2, 3), "strided": (3, 2), "empty": (0, 3), "one": (1,)}[rows]
    x = normal(*leading, *x_shape, seed=5)
    x = x.transpose(0, 1) if rows == "strided" else x
    inputs = [x, *(normal(*shape, seed=6 + n) for n, shape in enumerate(others))]
    weight = normal(*x.shape[:-1], OUT, seed=20)
    for wanted in itertools.product((True, False), repeat=len(inputs)):
        if not any(wanted):
            continue
        results = []
        for function in (ours, plain):
            leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
            out = function(*leaves)
            (out * weight).sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for got, expected in zip(*results, strict=True):
            assert (got is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert not ours(*inputs).requires_grad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative_is_right_or_refused(name: str) -> None:
    ours, plain, (x_shape, *others) = FUNCTIONS[name]
    inputs = [normal(2, *x_shape, seed=5), *(normal(*s, seed=6) for s in others)]
    second = []
    for function in (ours, plain):
        leaves = [t.detach().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        try:
            torch.stack([g.square().sum() for g in grads]).sum().backward()
            second.append([leaf.grad for leaf in leaves])
        except RuntimeError as error:
            assert function is ours and "once_differentiable" in str(error)
            return
    for got, expected in zip(*second, strict=True):
        torch.testing.assert_close(got, expected)


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    nn.Identity(),
    nn.SiLU(),
    lambda x: x,
    lambda x: x.view(x.shape),
    torch.relu,
]


@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
@pytest.mark.parametrize("same", [False, True])
def test_gate_with_any_activation_in_float64(number: int, same: bool) -> None:
    """An identity returns the gate itself, so an in-place product would change the saved gate."""
    activation = ACTIVATIONS[number]
    gate, up = (normal(3, 4, seed=n).requires_grad_() for n in (1, 2))
    kept = gate.detach().clone()
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, activation), (gate, up))
    assert torch.autograd.gradcheck(lambda a: gated(a, a if same else up, activation), (gate,))
    assert torch.equal(gate, kept)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad,) = torch.autograd.grad(
            gated(gate, up, activation).square().sum(), gate, create_graph=True
        )
        grad.sum().backward()


def test_gate_of_another_dtype_or_shape_is_promoted() -> None:
    gate = normal(3, 4, seed=1).bfloat16()
    for up in (normal(3, 4, seed=2).float(), normal(4, seed=2).bfloat16()):
        results = []
        for lean in (True, False):
            a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
            out = gated(a, b, nn.SiLU()) if lean else F.silu(a) * b
            out.sum().backward()
            assert a.grad is not None and b.grad is not None
            results.append((out.detach(), a.grad, b.grad))
        for got, expected in zip(*results, strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            torch.testing.assert_close(got, expected)


def test_in_place_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves its input alone"):
        gated(normal(2, 2, seed=1), normal(2, 2, seed=2), nn.ReLU(inplace=True))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_cross_entropy_of_a_head(rows: int) -> None:
    hidden, weight, bias = normal(rows, IN, seed=1), normal(7, IN, seed=2), normal(7, seed=3)
    target = torch.arange(rows) % 7
    strided = hidden.T.contiguous().T
    results = []
    for lean in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (strided, weight, bias)]
        h, w, b = leaves
        if lean:
            loss = linear_cross_entropy(h, w, target, bias_V=b, rows=2)
        else:
            loss = F.cross_entropy(F.linear(h, w, b), target, reduction="sum")
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
