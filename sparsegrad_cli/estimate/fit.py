"""The largest batch that a number of bytes has room for."""

from __future__ import annotations

from collections.abc import Callable

MOST = 65_536  # examples; beyond, something else limits a batch
_PATIENCE = 8  # guesses
_STRIDE = 8  # a guess beyond all that is known is at most so many times as large


def largest_batch(peak: Callable[[int], int], room: int) -> tuple[int, int]:
    """The largest batch whose peak is within ``room``.

    Every guess lies on the straight line through what is known: memory is nearly linear in the
    batch, so few are needed. Where it is not, the middle is taken after a while. The answer and
    the next larger batch have both been tried.

    Args:
        peak: bytes at a batch of so many examples, 1 to ``MOST``; grows with them.
        room: bytes.

    Returns:
        (batch, its peak); batch 0, and the peak of a batch of 1, where not even one example fits.
    """
    peaks = {1: peak(1)}
    if peaks[1] > room:
        return 0, peaks[1]
    low, high, guess = 1, MOST + 1, 2  # low fits; high does not, or is beyond all
    while high - low > 1:
        peaks[guess] = peak(guess)
        low, high = (guess, high) if peaks[guess] <= room else (low, guess)
        guess = _on_the_line(peaks, low, high, room)
        if len(peaks) > _PATIENCE:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low, peaks[low]


def _on_the_line(peaks: dict[int, int], low: int, high: int, room: int) -> int:
    """Where the line through ``low`` and the next known batch crosses ``room``."""
    other = high if high in peaks else max((n for n in peaks if n < low), default=0)
    rise = (peaks[low] - peaks.get(other, 0)) / (low - other)
    guess = int(low + (room - peaks[low]) / rise) if rise > 0 else high
    return guess if high in peaks else min(guess, _STRIDE * low)
