"""Bases from streamed gradients (Chekalina et al. 2024, section 3: HOSVD of the gradient stack).

For a stack {G_t} of gradients dL/dW, each (out, in), the HOSVD factors of the two matrix modes are

    Q_out = eigenvectors of  sum_t G_t G_t'   (out, out)
    Q_in  = eigenvectors of  sum_t G_t' G_t   (in, in)

so nothing is ever stacked: two Gram matrices hold all that is needed, whatever the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Orthonormal bases of one target, strongest direction first.

    The bases are kept by columns (see :func:`by_columns`).

    Attributes:
        q_out: (out, r_out), columns orthonormal.
        q_in: (in, r_in), columns orthonormal.
        singular_out: (r_out,) singular values of the stack unfolded along out, descending. Read
            from a file there may be more: those of the directions that were left out follow.
        singular_in: (r_in,) the same along in.
        tokens: () float64, how many live tokens were summed, all targets that share the basis
            together; None where it comes from gradients of batches, or from a file that does not
            say.
    """

    q_out: Tensor
    q_in: Tensor
    singular_out: Tensor
    singular_in: Tensor
    tokens: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of the two bases."""
        return sum(q.numel() * q.element_size() for q in (self.q_out, self.q_in))


class Stream(Protocol):
    """Sums over a stream of gradients, from which a basis comes.

    The data is gone over ``passes`` times, with :meth:`next_pass` between two passes.
    """

    passes: int
    count: int

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in)."""
        ...

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Add the tokens of a batch: dL/dy (N, out) and x (N, in)."""
        ...

    def next_pass(self) -> None:
        """Start the next pass from what the last one found."""
        ...

    def basis(self) -> Basis:
        """Bases after the last pass."""
        ...

    def sums(self) -> list[Tensor]:
        """What is a sum over the stream: to be added up where several processes share it."""
        ...

    def nbytes(self) -> int:
        """Bytes held."""
        ...


class GramStream:
    """The two Gram matrices of a stream of gradients; memory does not grow with the stream.

    Args:
        out_features, in_features: shape of every gradient.
        device, dtype: where and in what the sums are kept; float32 by default.
    """

    passes = 1

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.gram_out = torch.zeros(out_features, out_features, device=device, dtype=dtype)
        self.gram_in = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)
        self.of_tokens = False
        self.count = 0

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.gram_out.dtype)
        self.gram_out.addmm_(grad_OI, grad_OI.T)  # (out, in) @ (in, out)
        self.gram_in.addmm_(grad_OI.T, grad_OI)  # (in, out) @ (out, in)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor) -> None:
        """Add the tokens of a batch: sum g'g and sum x'x in place of the batch gradient's Grams.

        G = g' x summed over tokens lets tokens cancel; here none does. The eigenvectors are those
        of a Kronecker-factored second moment of the per-token gradients. Tokens that the loss does
        not depend on (padding) have g = 0 and are left out.

        Args:
            g_NO: (N, out) dL/dy.
            x_NI: (N, in) input of the layer.
        """
        g_NO, x_NI = live_tokens(g_NO, x_NI, self.gram_out.dtype)
        self.gram_out.addmm_(g_NO.T, g_NO)  # (out, N) @ (N, out)
        self.gram_in.addmm_(x_NI.T, x_NI)  # (in, N) @ (N, in)
        self.tokens += len(g_NO)
        self.of_tokens = True
        self.count += 1

    def merge(self, other: GramStream) -> None:
        """Add the sums of another stream of the same shape: Grams of unions are sums."""
        self.gram_out += other.gram_out
        self.gram_in += other.gram_in
        self.tokens += other.tokens
        self.of_tokens = self.of_tokens or other.of_tokens
        self.count += other.count

    def basis(self) -> Basis:
        """Full-rank bases of what was streamed.

        Raises:
            ValueError: nothing was added, or the sums are not finite.
        """
        if self.count == 0:
            raise ValueError("no gradient was added")
        q_out, singular_out = principal_directions(self.gram_out)
        q_in, singular_in = principal_directions(self.gram_in)
        tokens = self.tokens.clone() if self.of_tokens else None
        return Basis(q_out, q_in, singular_out, singular_in, tokens)

    def next_pass(self) -> None:
        """There is one pass only."""
        raise ValueError("Gram matrices are made in one pass")

    def sums(self) -> list[Tensor]:
        """What is a sum over the stream: to be added up where several processes share it."""
        return [self.gram_out, self.gram_in, self.tokens]

    def nbytes(self) -> int:
        """Bytes of the two sums."""
        return sum(g.numel() * g.element_size() for g in (self.gram_out, self.gram_in))


def live_tokens(g_NO: Tensor, x_NI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows on which the loss depends (g is not all zero: no padding), in ``dtype``."""
    live = (g_NO != 0).any(1)
    return g_NO[live].to(dtype), x_NI[live].to(dtype)


def principal_directions(gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric (d, d) matrix as columns, and the root of their eigenvalues.

    Strongest first. The sign of each column is fixed (its largest entry is positive), so that two
    runs of the same numbers give the same basis.

    Raises:
        ValueError: the matrix is not finite.
    """
    if not torch.isfinite(gram_DD).all():
        raise ValueError("the Gram matrix is not finite: a gradient overflowed")
    values, vectors = torch.linalg.eigh(gram_DD)  # ascending
    return by_columns(signed(vectors.flip(1))), values.flip(0).clamp_min(0).sqrt()


def signed(vectors_DR: Tensor) -> Tensor:
    """The same columns, each with the sign that makes its largest entry positive."""
    largest = vectors_DR.abs().argmax(dim=0, keepdim=True)
    return vectors_DR * torch.sign(vectors_DR.gather(0, largest))


def by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with each column contiguous in memory.

    A sparse core is rotated back one direction at a time, and a direction is a column: read with
    a stride, the sparse product takes 34 ms instead of 1.4 ms at 1536 x 384 and 1 %.
    """
    return matrix.T.contiguous().T


def truncated(basis: Basis, rank: int | float | None) -> Basis:
    """The leading directions of either side.

    Args:
        rank: an int keeps that many of each side (or all there are); a float in (0, 1] keeps as
            many as hold that share of the squared singular values, side by side; None keeps all.
    """
    if rank is None:
        return basis
    r_out = kept_columns(basis.singular_out, basis.q_out.shape[1], rank)
    r_in = kept_columns(basis.singular_in, basis.q_in.shape[1], rank)
    # Copies: a view of the leading columns would keep the whole basis alive.
    return Basis(
        by_columns(basis.q_out)[:, :r_out].clone(),
        by_columns(basis.q_in)[:, :r_in].clone(),
        basis.singular_out[:r_out].clone(),
        basis.singular_in[:r_in].clone(),
        basis.tokens,
    )


def is_whole(basis: Basis) -> bool:
    """Whether a basis is of full rank on both sides."""
    return all(q.shape[0] == q.shape[1] for q in (basis.q_out, basis.q_in))


def leading(basis: Basis, rank: int | float | None) -> Basis:
    """:func:`truncated`, with all singular values: a share of energy is one of the whole.

    With those of the kept directions alone, cutting to the same share again would drop more.
    """
    cut = truncated(basis, rank)
    return Basis(cut.q_out, cut.q_in, basis.singular_out, basis.singular_in, basis.tokens)


def kept_columns(singular: Tensor, columns: int, rank: int | float | None) -> int:
    """How many of ``columns`` directions a rank keeps; see :func:`truncated`."""
    if rank is None:
        return columns
    if isinstance(rank, int):
        return min(rank, columns)
    energy = singular.double().square().cumsum(0)
    if energy[-1] == 0:
        return columns
    # The first count whose sum reaches the share; rounding must not ask for one too many.
    return min(columns, int((energy < rank * energy[-1] * (1 - 1e-12)).sum()) + 1)
