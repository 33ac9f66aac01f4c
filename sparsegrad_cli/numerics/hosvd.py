"""Bases from streamed gradients (Chekalina et al. 2024, section 3: HOSVD of the gradient stack).

For a stack {G_t} of gradients dL/dW, each (out, in), the HOSVD factors of the two matrix modes are

    Q_out = eigenvectors of  sum_t G_t G_t'   (out, out)
    Q_in  = eigenvectors of  sum_t G_t' G_t   (in, in)

so the stack is never stored: two Gram matrices suffice, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        singular_out: (r_out,) singular values of the stack unfolded along out, descending. A basis
            from a file may have more: those of the directions that were left out.
        singular_in: (r_in,) the same along in.
        token_weight: () float64, sum over the live tokens of all targets that share the basis:
            of 1, or of |g|^2 |x|^2 for Grams of single tokens' gradients. None for a basis from
            gradients of batches, or from a file without it.
    """

    q_out: Tensor
    q_in: Tensor
    singular_out: Tensor
    singular_in: Tensor
    token_weight: Tensor | None = None

    def nbytes(self) -> int:
        """Return the bytes of the two bases."""
        return sum(q.numel() * q.element_size() for q in (self.q_out, self.q_in))

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Basis:
        """Return the bases in this dtype and on this device; singular values stay as they are."""
        q_out, q_in = (q.to(device=device, dtype=dtype) for q in (self.q_out, self.q_in))
        return Basis(q_out, q_in, self.singular_out, self.singular_in, self.token_weight)


def map_bases(
    bases: Mapping[str, Basis], change: Callable[[str, Basis], Basis]
) -> dict[str, Basis]:
    """Return name -> ``change(name, basis)``; names that share a basis share the result."""
    changed: dict[int, Basis] = {}
    for name, basis in bases.items():
        if id(basis) not in changed:
            changed[id(basis)] = change(name, basis)
    return {name: changed[id(basis)] for name, basis in bases.items()}


class Stream(Protocol):
    """Sums over a stream of gradients, from which a basis is made.

    The data is read ``passes`` times, with :meth:`next_pass` between two passes.
    """

    passes: int
    count: int

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in)."""
        ...

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor, *, weighted: bool = False) -> None:
        """Add the tokens of a batch: dL/dy (N, out) and x (N, in)."""
        ...

    def next_pass(self) -> None:
        """Start the next pass from the result of the last one."""
        ...

    def basis(self) -> Basis:
        """Return the bases after the last pass."""
        ...

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        ...

    def nbytes(self) -> int:
        """Return the bytes held."""
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
        self.token_weight = torch.zeros((), device=device, dtype=torch.float64)
        self.of_tokens = False
        self.count = 0

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.gram_out.dtype)
        self.gram_out.addmm_(grad_OI, grad_OI.T)  # (out, in) @ (in, out)
        self.gram_in.addmm_(grad_OI.T, grad_OI)  # (in, out) @ (out, in)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor, *, weighted: bool = False) -> None:
        """Add the tokens of a batch in place of the batch gradient's Grams.

        G = g' x summed over tokens lets tokens cancel; here none does. The sums are

            sum g'g          and  sum x'x            a Kronecker-factored second moment
            sum |x|^2 g'g    and  sum |g|^2 x'x      weighted: the Grams of the gradients g_n' x_n

        Tokens that the loss does not depend on (padding) have g = 0 and are left out.

        Args:
            g_NO: (N, out) dL/dy.
            x_NI: (N, in) input of the layer.
            weighted: whether each token counts by the size of its gradient.
        """
        g_NO, x_NI, weight = live_tokens(g_NO, x_NI, self.gram_out.dtype, weighted=weighted)
        self.gram_out.addmm_(g_NO.T, g_NO)  # (out, N) @ (N, out)
        self.gram_in.addmm_(x_NI.T, x_NI)  # (in, N) @ (N, in)
        self.token_weight += weight
        self.of_tokens = True
        self.count += 1

    def merge(self, other: GramStream) -> None:
        """Add the sums of another stream of the same shape: Grams of unions are sums."""
        self.gram_out += other.gram_out
        self.gram_in += other.gram_in
        self.token_weight += other.token_weight
        self.of_tokens = self.of_tokens or other.of_tokens
        self.count += other.count

    def basis(self) -> Basis:
        """Return the full-rank bases of the stream.

        Raises:
            ValueError: nothing was added, or the sums are not finite.
        """
        if self.count == 0:
            raise ValueError("no gradient was added")
        q_out, singular_out = principal_directions(self.gram_out)
        q_in, singular_in = principal_directions(self.gram_in)
        weight = self.token_weight.clone() if self.of_tokens else None
        return Basis(q_out, q_in, singular_out, singular_in, weight)

    def next_pass(self) -> None:
        """Raise: there is only one pass."""
        raise ValueError("Gram matrices are made in one pass")

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.gram_out, self.gram_in, self.token_weight]

    def nbytes(self) -> int:
        """Return the bytes of the two sums."""
        return sum(g.numel() * g.element_size() for g in (self.gram_out, self.gram_in))


class SequentialStream:
    """Sequentially truncated HOSVD (Vannieuwenhoven, Vandebril & Meerbergen 2012), streamed.

    The narrow side's basis comes first, over one pass. In a second pass every gradient is projected
    onto it, and the wide side's Gram is that of the projected gradients: the directions of the wide
    side that matter to a core of this rank, at r / narrow of the multiplications.

    Args:
        out_features, in_features: shape of every gradient.
        rank: of the narrow side: a number, a share of its energy, or None for all.
        device, dtype: where and in what the sums are kept; float32 by default.
    """

    passes = 2

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int | float | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.count = rank, 0
        self.out_is_narrow = out_features <= in_features
        narrow, self._wide = sorted((out_features, in_features))
        self.gram = torch.zeros(narrow, narrow, device=device, dtype=dtype)
        self._narrow: tuple[Tensor, Tensor] | None = None

    def add(self, grad_OI: Tensor) -> None:
        """Add one gradient, (out, in), any floating dtype."""
        grad_OI = grad_OI.to(self.gram.dtype)
        grad_AB = grad_OI if self.out_is_narrow else grad_OI.T  # (narrow, wide)
        if self._narrow is None:
            self.gram.addmm_(grad_AB, grad_AB.T)  # (narrow, wide) @ (wide, narrow)
        else:
            projected_RB = self._narrow[0].T @ grad_AB  # (r, narrow) @ (narrow, wide)
            self.gram.addmm_(projected_RB.T, projected_RB)  # (wide, r) @ (r, wide)
        self.count += 1

    def add_tokens(self, g_NO: Tensor, x_NI: Tensor, *, weighted: bool = False) -> None:
        """Raise: the two Grams of tokens have no common side to project.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("sequential truncation is for gradients of batches")

    def next_pass(self) -> None:
        """Fix the narrow side; the next gradients go to the wide one."""
        if self.count == 0:
            raise ValueError("no gradient was added")
        q, singular = principal_directions(self.gram)
        keep = kept_columns(singular, q.shape[1], self.rank)
        # The whole spectrum: the core's rank is derived from a share of its energy again.
        self._narrow = q[:, :keep].clone(), singular.clone()
        self.gram = self.gram.new_zeros(self._wide, self._wide)
        self.count = 0

    def basis(self) -> Basis:
        """Return the narrow side truncated and the wide one whole.

        Raises:
            ValueError: a pass is missing, or the sums are not finite.
        """
        if self.count == 0 or self._narrow is None:
            raise ValueError("no gradient was added")
        q_narrow, singular_narrow = self._narrow
        q_wide, singular_wide = principal_directions(self.gram)
        if self.out_is_narrow:
            return Basis(q_narrow, q_wide, singular_narrow, singular_wide)
        return Basis(q_wide, q_narrow, singular_wide, singular_narrow)

    def sums(self) -> list[Tensor]:
        """Return the sums over the stream, which are added up over processes."""
        return [self.gram]

    def nbytes(self) -> int:
        """Return the bytes of the sum."""
        return self.gram.numel() * self.gram.element_size()


def live_tokens(
    g_NO: Tensor, x_NI: Tensor, dtype: torch.dtype, *, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return the rows on which the loss depends (g is not all zero), in ``dtype``.

    Returns:
        g and x of the live tokens, and their number. Weighted: |x_n| g_n and |g_n| x_n, and the sum
        of |g_n|^2 |x_n|^2, () float64.
    """
    live = (g_NO != 0).any(1)
    g_NO, x_NI = g_NO[live].to(dtype), x_NI[live].to(dtype)
    if not weighted:
        return g_NO, x_NI, len(g_NO)
    size_g_N1, size_x_N1 = g_NO.norm(dim=1, keepdim=True), x_NI.norm(dim=1, keepdim=True)
    weight = (size_g_N1.double() * size_x_N1.double()).square().sum()
    return g_NO.mul_(size_x_N1), x_NI.mul_(size_g_N1), weight


def principal_directions(gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of a symmetric (d, d) matrix and the roots of its eigenvalues.

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
    """Return the columns, each with the sign that makes its largest entry positive."""
    largest = vectors_DR.abs().argmax(dim=0, keepdim=True)
    return vectors_DR * torch.sign(vectors_DR.gather(0, largest))


def by_columns(matrix: Tensor) -> Tensor:
    """Return the matrix with each column contiguous in memory.

    A sparse core is rotated back one direction at a time, and a direction is a column: read with
    a stride, the sparse product takes 34 ms instead of 1.4 ms at 1536 x 384 and 1 %.
    """
    return matrix.T.contiguous().T


def truncated(basis: Basis, rank: int | float | None) -> Basis:
    """Return the leading directions of both sides.

    Args:
        rank: an int keeps that many of each side (or all there are); a float in (0, 1] keeps the
            fewest that hold that share of each side's squared singular values; None keeps all.
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
        basis.token_weight,
    )


def is_whole(basis: Basis) -> bool:
    """Return whether a basis is of full rank on both sides."""
    return all(q.shape[0] == q.shape[1] for q in (basis.q_out, basis.q_in))


def leading(basis: Basis, rank: int | float | None) -> Basis:
    """Truncate the directions, and keep all singular values.

    A share of energy refers to all of them: with those of the kept directions alone, truncating to
    the same share again would drop more.
    """
    cut = truncated(basis, rank)
    return Basis(cut.q_out, cut.q_in, basis.singular_out, basis.singular_in, basis.token_weight)


def kept_columns(singular: Tensor, columns: int, rank: int | float | None) -> int:
    """Return how many of ``columns`` directions a rank keeps; see :func:`truncated`."""
    if rank is None:
        return columns
    if isinstance(rank, int):
        return min(rank, columns)
    energy = singular.double().square().cumsum(0)
    if energy[-1] == 0:
        return columns
    # The first count whose sum reaches the share; rounding must not ask for one too many.
    return min(columns, int((energy < rank * energy[-1] * (1 - 1e-12)).sum()) + 1)
