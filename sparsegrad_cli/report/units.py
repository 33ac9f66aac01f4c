"""Format numbers for readers, and name statuses and memory categories in words.

Inside the program, bytes are ints, times are in seconds and scores are fractions. Every function
accepts None for a value that a record does not have, and returns ``not recorded``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from sparsegrad_cli.records.metric_direction import SCORE, Scale

NOT_RECORDED = "not recorded"
NOTHING = "–"  # The mean, the interval or the best of an empty list.
_LARGEST_FIXED = 1e9  # Larger scores, of a run that diverged, have an exponent.
MINUS = "\u2212"
MIB = 1024**2
GIB = 1024**3
STATUSES = {
    "done": "done",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "interrupted": "interrupted",
    "pruned": "pruned",
    "running": "still running",
    "pending": "not run yet",
    "unknown": "unknown",
}
CATEGORIES = {
    "weights": "weights",
    "bases": "bases",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved_activations": "saved activations",
    "other": "other",
}
TRAIN_STEP = ("forward", "backward", "optimizer")


def status_words(status: str) -> str:
    """Return a status in words; an unknown status is returned unchanged."""
    return STATUSES.get(status, status.replace("_", " "))


def words(value: object) -> str:
    """Return a value as text; ``yes`` or ``no`` for a boolean."""
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def format_bytes(count: float | None) -> str:
    """Format bytes as ``12.3 MiB``, in B, KiB, MiB or GiB by size."""
    if count is None:
        return NOT_RECORDED
    if abs(count) < 1024:
        return f"{count:.0f} B"
    value = float(count)
    for unit in ("KiB", "MiB"):
        value /= 1024
        # 1023.95 would be shown as 1024.0.
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} GiB"


def format_kib(count: float | None) -> str:
    """Format bytes as a number of KiB, for columns that name the unit."""
    return format_fixed(None if count is None else count / 1024, 1)


def format_mib(count: float | None, digits: int = 1) -> str:
    """Format bytes as a number of MiB, ``1,234.5``, for columns that name the unit."""
    return format_fixed(None if count is None else count / MIB, digits)


def format_gib(count: float | None) -> str:
    """Format bytes as a number of GiB, ``12.55``, for columns that name the unit."""
    return format_fixed(None if count is None else count / GIB, 2)


def format_fixed(value: float | None, digits: int) -> str:
    """Format a number with ``digits`` decimals and thousands separators."""
    return NOT_RECORDED if value is None else f"{value:,.{digits}f}"


def format_seconds(seconds: float | None) -> str:
    """Format seconds as ``1 min 12 s``, in milliseconds to days by size."""
    if seconds is None:
        return NOT_RECORDED
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 0.0995:
        return f"{1000 * seconds:.3g} ms"
    if abs(seconds) < 9.95:
        return f"{seconds:.2f} s" if abs(seconds) < 0.995 else f"{seconds:.1f} s"
    if abs(seconds) < 59.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return _pair(whole, 60, "min", "s")
    whole = round(whole / 60)
    if whole < 24 * 60:
        return _pair(whole, 60, "h", "min")
    return _pair(round(whole / 60), 24, "d", "h")


def _pair(whole: int, per: int, large: str, small: str) -> str:
    first, second = divmod(whole, per)
    return f"{first} {large} {second} {small}" if second else f"{first} {large}"


def format_count(count: float | None) -> str:
    """Format a count as ``70,776``, and a mean of counts as ``70,776.5``."""
    if count is None:
        return NOT_RECORDED
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def format_share(share: float | None) -> str:
    """Format a share as ``1.00 %``: three significant digits below 10 %, one decimal above."""
    if share is None:
        return NOT_RECORDED
    percent = 100 * share
    if percent == 0 or abs(percent) >= 9.995:
        return f"{percent:.1f} %" if percent % 1 else f"{percent:.0f} %"
    return f"{percent:.2f} %" if abs(percent) >= 0.01 else f"{percent:.1g} %"


def format_percent(share: float | None) -> str:
    """Format a share as a percentage, ``61.2``, for columns that name the unit."""
    return format_fixed(None if share is None else 100 * share, 1)


def format_score(score: float | None, scale: Scale = SCORE, *, sign: bool = False) -> str:
    """Format a fraction times 100 with one decimal, ``61.2``, and a loss as ``1.234``."""
    if score is None:
        return NOT_RECORDED
    form = f"{'+' if sign else ''}.{scale.digits}"
    if math.isfinite(score) and abs(score) >= _LARGEST_FIXED:  # 100 times it may exceed a float.
        return f"{scale.times * Decimal(score):{form}e}".replace("-", MINUS)
    shown = f"{scale.times * score:{form}f}"
    if float(shown) == 0:
        return shown.lstrip("+-")
    return shown.replace("-", MINUS)


def format_spread(mean: float | None, std: float | None, scale: Scale = SCORE) -> str:
    """Format a score as ``61.2 ± 0.4``, or only the mean if there is one seed."""
    if mean is None or std is None:
        return format_score(mean, scale)
    return f"{format_score(mean, scale)} ± {scale.times * std:.{scale.digits}f}"


def format_interval(interval: Sequence[float] | None, scale: Scale = SCORE) -> str:
    """Format an interval as ``58.1 to 62.3``, or a dash if there is one seed."""
    if interval is None:
        return NOTHING
    low, high = interval
    return f"{format_score(low, scale)} to {format_score(high, scale)}"


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits; small ones as ``3.05e-05``."""
    if value is None:
        return NOT_RECORDED
    if value != 0 and not 1e-3 <= abs(value) < 10**digits:
        shown = f"{value:,.0f}" if abs(value) >= 1 else f"{value:.{digits}g}"
    else:
        shown = f"{value:.{digits}g}"
    return shown.replace("-", MINUS, 1) if shown.startswith("-") else shown


def format_amount(amount: float | None, kind: str | None) -> str:
    """Format an amount of a budget: ``69,120 parameters``, ``1,036.2 MiB``."""
    if amount is None:
        return NOT_RECORDED
    return f"{format_count(amount)} parameters" if kind == "trainable" else format_bytes(amount)


def format_p(p: float | None) -> str:
    """Format a p-value as ``0.030``, never as zero; a dash if there was no test."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_signed_share(share: float) -> str:
    """Format a share with its sign: ``+1.26 %``."""
    return f"{'+' if share >= 0 else MINUS}{format_share(abs(share))}"


def counted(count: float, thing: str) -> str:
    """Format a count with its noun: ``1 task``, ``3 tasks``."""
    return f"{format_count(count)} {thing}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Return names as ``a``, ``a and b`` or ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), *names[-1:]] if len(names) > 1 else names)
