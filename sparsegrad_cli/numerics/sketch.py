"""Leading directions without a Gram matrix: a randomized range finder, streamed.

A Gram matrix A of a wide side costs d x d bytes and, per gradient, d x d x (other side)
multiplications; its eigenvectors d^3. A basis of rank r needs only r columns. So A is only
ever multiplied by a thin test matrix Omega (d, l), l a little over r:

    Y = A Omega,   streamed as   Y += G (G' Omega)   or, over tokens,   Y += g' (g Omega)

(range finder: Halko, Martinsson & Tropp 2011). After the last pass the eigenvectors come from the
Nystroem approximation A ~ Y (Omega' Y)^-1 Y' (Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3).
A further pass over the data starts from the orthonormalised Y of the pass before: a power step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import (
    Basis,
    by_columns,
    live_tokens,
    principal_directions,
    signed,
)

SPARE_COLUMNS = 32  # that a test matrix has beyond the directions, at least


class Side:
    """The Gram matrix A = sum R'R of one side of a stream, or its product with a test matrix.

    Args:
        features: d, columns of every R.
        width: columns of the test matrix; a narrow side has none.
        generator: draws the test matrix.
        device, dtype: of the sum.

    Attributes:
        omega: the test matrix (d, l), columns orthonormal; None if A itself is summed.
        sum: A Omega (d, l), or A (d, d).
    """

    def __init__(
        self,
        features: int,
        width: int,
        generator: torch.Generator,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.omega: Tensor | None = None
        # Then A takes no more memory than test matrix and product, and no more time.
        if features > 2 * width:
            # Made on the CPU in float64: the same test matrices on every device.
            drawn = torch.randn(features, width, generator=generator, dtype=torch.float64)
            self.omega = torch.linalg.qr(drawn).Q.to(device=device, dtype=dtype)
        columns = features if self.omega is None else width
        self.sum = torch.zeros(features, columns, device=device, dtype=dtype)

    def add(self, rows_ND: Tensor) -> None:
        """Add R'R, (d, N) @ (N, d), or R'(R Omega), (d, N) @ ((N, d) @ (d, l))."""
        self.sum.addmm_(rows_ND.T, rows_ND if self.omega is None else rows_ND @ self.omega)

    def next_pass(self) -> None:
        """Start a power step from the directions found so far."""
        if self.omega is not None:
            self.omega = torch.linalg.qr(self.sum.double()).Q.to(self.sum.dtype)
        self.sum = torch.zeros_like(self.sum)

    def directions(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the leading eigenvectors (d, rank) of A and the roots of their eigenvalues."""
        if self.omega is not None:
            return nystroem(self.omega, self.sum, rank)
        q, singular = principal_directions(self.sum)
        return by_columns(q[:, :rank]), singular[:rank]

    def nbytes(self) -> int:
        """Return the bytes of the test matrix and the sum."""
        held = (self.sum,) if self.omega is None else (self.omega, self.sum)
        return sum(t.numel() * t.element_size() for t in held)


class SketchStream:
    """Thin products with both Gram matrices of a stream; see :class:`GramStream` for the contract.

    A side with at most twice as many features as the test matrix has columns is summed exactly.

    Args:
        out_features, in_features: shape of every gradient.
        rank: directions wanted per side.
        power_steps: passes over the data beyond the first.
        seed: of the test matrices; streams that are added up need the same one.
        device, dtype: where and in what the products are kept; float32 by default.

    Attributes:
        of_out, of_in: the sums of the two sides.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int,
        power_steps: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = rank + max(SPARE_COLUMNS, rank)
        self.of_out = Side(out_features, width, generator, device, dtype)
        self.of_in = Side(in_features, width, generator, device, dtype)
        self.rank, self.passes, self.count = rank, 1 + power_steps, 0
        self.token_weight = torch.zeros((), device=device, dtype=torch.float64)
        self.of_tokens = False

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.of_out.sum.dtype)
        self.of_out.add(grad_OI.T)
        self.of_in.add(grad_OI)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor, *, weighted: bool = False) -> None:
        """Add the tokens of a batch; see :meth:`GramStream.add_tokens`."""
        g_NO, x_NI, weight = live_tokens(g_NO, x_NI, self.of_out.sum.dtype, weighted=weighted)
        self.of_out.add(g_NO)
        self.of_in.add(x_NI)
        self.token_weight += weight
        self.of_tokens = True
        self.count += 1

    def next_pass(self) -> None:
        """Start a power step from the directions found so far."""
        self.of_out.next_pass()
        self.of_in.next_pass()
        self.token_weight.zero_()
        self.count = 0

    def basis(self) -> Basis:
        """Return the leading ``rank`` directions of both sides.

        Raises:
            ValueError: nothing was added, or the products are not finite.
        """
        if self.count == 0:
            raise ValueError("no gradient was added")
        q_out, singular_out = self.of_out.directions(self.rank)
        q_in, singular_in = self.of_in.directions(self.rank)
        weight = self.token_weight.clone() if self.of_tokens else None
        return Basis(q_out, q_in, singular_out, singular_in, weight)

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.of_out.sum, self.of_in.sum, self.token_weight]

    def nbytes(self) -> int:
        """Return the bytes of test matrices and sums."""
        return self.of_out.nbytes() + self.of_in.nbytes()


def nystroem(omega_DL: Tensor, y_DL: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors of A from Y = A Omega, and the roots of their eigenvalues.

    Args:
        omega_DL: (d, l), columns orthonormal.
        y_DL: (d, l), A positive semi-definite.
        rank: columns wanted.

    Returns:
        (d, min(rank, l)) and as many singular values, strongest first, signs fixed, in y's dtype.

    Raises:
        ValueError: Y is not finite.
    """
    if not torch.isfinite(y_DL).all():
        raise ValueError("the Gram matrix is not finite: a gradient overflowed")
    omega, y = omega_DL.double(), y_DL.double()
    # A small multiple of the identity is added to A and taken off the eigenvalues again: without
    # it, rounding can make Omega' Y indefinite. Its size is that of Y's rounding errors.
    shift = torch.finfo(y_DL.dtype).eps * float(torch.linalg.matrix_norm(y))
    y = y + shift * omega
    small = omega.T @ y  # (l, d) @ (d, l)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    floor = max(shift, float(values.abs().max()) * 1e-14, torch.finfo(torch.float64).tiny)
    root_DL = (y @ vectors) * values.clamp_min(floor).rsqrt()  # (d, l) @ (l, l)
    q, singular, _ = torch.linalg.svd(root_DL, full_matrices=False)
    found = (singular.square() - shift).clamp_min(0).sqrt()
    q, found = q[:, :rank].to(y_DL.dtype), found[:rank].to(y_DL.dtype)
    return by_columns(signed(q)), found
