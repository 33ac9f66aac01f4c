"""Random matrices that follow from a key and are drawn again where they are needed.

The numbers are those of a counter-based generator: entry i of key k is a hash of (k, i), in whole
numbers of 64 bits. They are the same bit for bit on every device, so what was trained on one loads
on another. The hash is SplitMix64 (Steele, Lea and Flood 2014, figure 16).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 18  # entries that are drawn at a time: 2 MiB in 64 bits


def _signed(value: int) -> int:
    """Return the 64-bit whole number with these bits, which wraps around as unsigned ones do."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _hash_(z: Tensor) -> Tensor:
    """Hash whole numbers of 64 bits in place, and return them."""
    shifted = torch.empty_like(z)
    for bits, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        torch.bitwise_right_shift(z, bits, out=shifted)
        # torch shifts copies of the sign in from the left, where the hash wants zeros.
        z.bitwise_xor_(shifted.bitwise_and_((1 << (64 - bits)) - 1)).mul_(factor)
    return z


def uniform(key: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return entries ``start`` to ``start + count`` of a key: (count,), uniform in [-1, 1).

    Args:
        key: int64 of no dimension; says the device.
        start: number of the first entry.
        count: how many.
        dtype: float32 or wider; the values are multiples of 2^-23, so they are exact.
    """
    numbers = torch.arange(start + 1, start + count + 1, device=key.device)
    hashed = _hash_(numbers.mul_(_STEP).add_(_hash_(key.clone())))
    bits = hashed.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1)
    return bits.to(dtype).mul_(2.0**-23).sub_(1)


class _Combination(torch.autograd.Function):
    """See :func:`combination`."""

    @staticmethod
    def forward(ctx: Any, coefficients_K: Tensor, key: Tensor, rows: int, columns: int) -> Tensor:
        size = rows * columns
        made = coefficients_K.new_zeros(size)
        for first, matrices_CS in _chunks(key, len(coefficients_K), size, coefficients_K.dtype):
            # (c,) @ (c, size)
            made += coefficients_K[first : first + len(matrices_CS)] @ matrices_CS
        ctx.save_for_backward(key)
        ctx.count = len(coefficients_K)
        return made.view(rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (key,) = ctx.saved_tensors
        g_S = grads[0].reshape(-1)
        parts = [
            matrices_CS @ g_S  # (c, size) @ (size,)
            for _, matrices_CS in _chunks(key, ctx.count, len(g_S), g_S.dtype)
        ]
        return torch.cat(parts), None, None, None


def _chunks(key: Tensor, count: int, size: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the matrices, a few at a time: the number of the first, and all of them (c, size)."""
    at_a_time = max(1, _CHUNK // size)
    for first in range(0, count, at_a_time):
        some = min(at_a_time, count - first)
        yield first, uniform(key, first * size, some * size, dtype).view(some, size)


def combination(coefficients_K: Tensor, key: Tensor, rows: int, columns: int) -> Tensor:
    """Return sum_k c_k M_k, (rows, columns), for the random matrices M_k of a key.

    The entries of M_k are uniform in [-1, 1) / sqrt(K). The matrices are drawn in either pass, a
    few at a time, and never kept.

    Args:
        coefficients_K: c, (K,), float32 or wider; gets a gradient.
        key: int64 of no dimension, on the same device.
        rows, columns: shape of each matrix.
    """
    scaled_K = coefficients_K * len(coefficients_K) ** -0.5
    made: Tensor = _Combination.apply(scaled_K, key, rows, columns)
    return made
