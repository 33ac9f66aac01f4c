"""Rotation of weights and gradients, computed by hand in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.rotation import from_core, from_sparse_core, rotated_linear, to_core

SHAPES = [(9, 5), (5, 9), (6, 6)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_basis(out: int, width: int, r_out: int | None = None, r_in: int | None = None) -> Basis:
    """Return random orthonormal bases, truncated if ranks are given."""
    q_out = torch.linalg.qr(normal(out, out, seed=1)).Q[:, : r_out or out].contiguous()
    q_in = torch.linalg.qr(normal(width, width, seed=2)).Q[:, : r_in or width].contiguous()
    return Basis(q_out, q_in, torch.ones(q_out.shape[1]), torch.ones(q_in.shape[1]))


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("truncate", [False, True])
def test_core_gradient_identity(out: int, width: int, truncate: bool) -> None:
    """Q_out' G Q_in with G = g' x equals (g Q_out)' (x Q_in)."""
    basis = make_basis(out, width, *((3, 2) if truncate else ()))
    g_NO, x_NI = normal(11, out, seed=3), normal(11, width, seed=4)
    grad_OI = g_NO.T @ x_NI  # (out, N) @ (N, in)
    rotated = (g_NO @ basis.q_out).T @ (x_NI @ basis.q_in)
    torch.testing.assert_close(to_core(grad_OI, basis), rotated, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_to_core_equals_the_sum(out: int, width: int) -> None:
    basis, matrix = make_basis(out, width, 4, 3), normal(out, width, seed=3)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for r in range(4):
        for s in range(3):
            for o in range(out):
                for i in range(width):
                    expected[r, s] += basis.q_out[o, r] * matrix[o, i] * basis.q_in[i, s]
    torch.testing.assert_close(to_core(matrix, basis), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_from_core_inverts_to_core_at_full_rank(out: int, width: int) -> None:
    basis, matrix = make_basis(out, width), normal(out, width, seed=3)
    torch.testing.assert_close(from_core(to_core(matrix, basis), basis), matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(to_core(from_core(matrix, basis), basis), matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_from_core_of_a_truncated_basis_is_the_projection(out: int, width: int) -> None:
    basis, matrix = make_basis(out, width, 4, 3), normal(out, width, seed=3)
    projector_out, projector_in = basis.q_out @ basis.q_out.T, basis.q_in @ basis.q_in.T
    got = from_core(to_core(matrix, basis), basis)
    torch.testing.assert_close(got, projector_out @ matrix @ projector_in, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("ranks", [(None, None), (4, 2), (2, 4)])
@pytest.mark.parametrize("count", [1, 5])
def test_from_sparse_core_equals_the_dense_product(
    out: int, width: int, ranks: tuple[int | None, int | None], count: int
) -> None:
    basis = make_basis(out, width, *ranks)
    r_out, r_in = basis.q_out.shape[1], basis.q_in.shape[1]
    order = torch.randperm(r_out * r_in, generator=torch.Generator().manual_seed(6))
    indices, values = order[:count], normal(count, seed=7)
    dense = torch.zeros(r_out, r_in, dtype=torch.float64)
    for index, value in zip(indices.tolist(), values.tolist(), strict=True):
        dense[index // r_in, index % r_in] = value
    expected = basis.q_out @ dense @ basis.q_in.T
    got = from_sparse_core(indices, values, basis)
    assert got.shape == (out, width)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_from_sparse_core_without_entries_is_zero() -> None:
    basis = make_basis(5, 9)
    got = from_sparse_core(torch.empty(0, dtype=torch.int64), torch.empty(0).double(), basis)
    assert torch.equal(got, torch.zeros(5, 9, dtype=torch.float64))


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_rotated_linear_equals_the_plain_layer(out: int, width: int) -> None:
    basis, weight, bias = make_basis(out, width), normal(out, width, seed=3), normal(out, seed=4)
    x = normal(2, 3, width, seed=5)
    core = basis.q_out.T @ weight @ basis.q_in
    for b in (bias, None):
        plain = x @ weight.T + (bias if b is not None else 0)
        torch.testing.assert_close(rotated_linear(x, core, b, basis), plain, atol=1e-12, rtol=0)


def test_transposed_input_basis_gives_another_function() -> None:
    """The published code has this error: with core = Q_out' W Q_in the function would change."""
    basis, weight, x = make_basis(6, 6), normal(6, 6, seed=3), normal(4, 6, seed=5)
    core = to_core(weight, basis)
    slip = ((x @ basis.q_in.T) @ core.T) @ basis.q_out.T
    assert not torch.allclose(slip, x @ weight.T, atol=1e-3)
    torch.testing.assert_close(
        rotated_linear(x, core, None, basis), x @ weight.T, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_gradcheck_on_input_core_and_bias(out: int, width: int) -> None:
    basis = make_basis(out, width)
    inputs = [normal(4, width, seed=3), normal(out, width, seed=4), normal(out, seed=5)]
    for tensor in inputs:
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, c, b: rotated_linear(x, c, b, basis), inputs)


def test_gradients_by_hand_and_the_bias_is_never_rotated() -> None:
    out, width = 5, 7
    basis = make_basis(out, width)
    x, core = normal(6, width, seed=3).requires_grad_(), normal(out, width, seed=4).requires_grad_()
    bias, g = normal(out, seed=5).requires_grad_(), normal(6, out, seed=8)
    rotated_linear(x, core, bias, basis).backward(g)
    assert x.grad is not None and core.grad is not None and bias.grad is not None
    torch.testing.assert_close(
        core.grad, (g @ basis.q_out).T @ (x.detach() @ basis.q_in), atol=1e-12, rtol=0
    )
    weight = basis.q_out @ core.detach() @ basis.q_in.T
    torch.testing.assert_close(x.grad, g @ weight, atol=1e-12, rtol=0)
    column_sum = torch.stack([g[:, o].sum() for o in range(out)])
    torch.testing.assert_close(bias.grad, column_sum, atol=1e-12, rtol=0)
    rotated_sum = (g @ basis.q_out).sum(0)
    assert not torch.allclose(bias.grad, rotated_sum, atol=1e-3), "the test can tell the two apart"


def test_layer_core_gradient_equals_the_rotated_weight_gradient() -> None:
    basis, weight = make_basis(9, 5), normal(9, 5, seed=3)
    x, g = normal(4, 5, seed=4), normal(4, 9, seed=5)
    core = to_core(weight, basis).requires_grad_()
    rotated_linear(x, core, None, basis).backward(g)
    plain = weight.clone().requires_grad_()
    (x @ plain.T).backward(g)
    assert core.grad is not None and plain.grad is not None
    torch.testing.assert_close(core.grad, to_core(plain.grad, basis), atol=1e-12, rtol=0)


def test_the_core_layer_saves_the_rotated_input_not_the_input() -> None:
    """dL/dC needs only x Q_in, so the storage of x is not saved for backward."""
    basis, core = make_basis(5, 7), normal(5, 7, seed=4).requires_grad_()
    x = normal(6, 7, seed=3)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rotated_linear(x, core, None, basis)
    assert saved and x.data_ptr() not in saved
