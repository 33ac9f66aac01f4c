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

from sparsegrad_cli.numerics.hosvd import Basis, by_columns, live_tokens, signed

OVERSAMPLING = 32


class SketchStream:
    """Thin products with both Gram matrices of a stream; see :class:`GramStream` for the contract.

    Args:
        out_features, in_features: shape of every gradient.
        rank: directions wanted per side; sides with at most rank + 32 are exact.
        power_steps: passes over the data beyond the first.
        seed: of the test matrices; streams that are added up need the same one.
        device, dtype: where and in what the products are kept; float32 by default.
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
        self.rank, self.passes, self.count = rank, 1 + power_steps, 0
        generator = torch.Generator().manual_seed(seed)
        width_out = min(out_features, rank + OVERSAMPLING)
        width_in = min(in_features, rank + OVERSAMPLING)
        omega_out = torch.randn(out_features, width_out, generator=generator, dtype=torch.float64)
        omega_in = torch.randn(in_features, width_in, generator=generator, dtype=torch.float64)
        # Made on the CPU in float64: the same test matrices on every device.
        self.omega_out = torch.linalg.qr(omega_out).Q.to(device=device, dtype=dtype)
        self.omega_in = torch.linalg.qr(omega_in).Q.to(device=device, dtype=dtype)
        self.y_out, self.y_in = torch.zeros_like(self.omega_out), torch.zeros_like(self.omega_in)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.of_tokens = False

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.y_out.dtype)
        # (out, in) @ ((in, out) @ (out, l)) and (in, out) @ ((out, in) @ (in, l))
        self.y_out.addmm_(grad_OI, grad_OI.T @ self.omega_out)
        self.y_in.addmm_(grad_OI.T, grad_OI @ self.omega_in)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Add the tokens of a batch; see :meth:`GramStream.add_tokens`."""
        g_NO, x_NI = live_tokens(g_NO, x_NI, self.y_out.dtype)
        # (out, N) @ ((N, out) @ (out, l)) and (in, N) @ ((N, in) @ (in, l))
        self.y_out.addmm_(g_NO.T, g_NO @ self.omega_out)
        self.y_in.addmm_(x_NI.T, x_NI @ self.omega_in)
        self.tokens += len(g_NO)
        self.of_tokens = True
        self.count += 1

    def next_pass(self) -> None:
        """Start a power step from the directions found so far."""
        self.omega_out, self.omega_in = (
            torch.linalg.qr(y.double()).Q.to(y.dtype) for y in (self.y_out, self.y_in)
        )
        self.y_out, self.y_in = torch.zeros_like(self.y_out), torch.zeros_like(self.y_in)
        self.tokens.zero_()
        self.count = 0

    def basis(self) -> Basis:
        """Return the leading ``rank`` directions of both sides.

        Raises:
            ValueError: nothing was added, or the products are not finite.
        """
        if self.count == 0:
            raise ValueError("no gradient was added")
        q_out, singular_out = nystroem(self.omega_out, self.y_out, self.rank)
        q_in, singular_in = nystroem(self.omega_in, self.y_in, self.rank)
        tokens = self.tokens.clone() if self.of_tokens else None
        return Basis(q_out, q_in, singular_out, singular_in, tokens)

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.y_out, self.y_in, self.tokens]

    def nbytes(self) -> int:
        """Return the bytes of test matrices and products."""
        tensors = (self.omega_out, self.omega_in, self.y_out, self.y_in)
        return sum(t.numel() * t.element_size() for t in tensors)


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
