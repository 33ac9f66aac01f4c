"""Which conversations validate: by a hash of their group, so that it never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from sparsegrad_cli.errors import DataError, UsageError

USUAL_FRACTION = 0.1  # the default of task.validation_fraction


def position(group: str) -> float:
    """A number in [0, 1] that depends on the group's name alone.

    The first 64 bits of sha256("validation\\\\n" + name) as a share of 2^64: the same on every
    platform, whatever the seed, the order and the other groups.
    """
    digest = hashlib.sha256(b"validation\n" + group.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(groups: Iterable[str], fraction: float, unit: str) -> tuple[set[str], str]:
    """Groups to validate on, and a note that says how they were chosen.

    Those below ``fraction``: a group that is added changes no other's place, and a larger fraction
    holds out the same ones and more. Where that leaves one side empty, the nearest group changes
    sides, and the note says so.

    Args:
        groups: their names; repetitions do not matter.
        fraction: between 0 and 1.
        unit: what a group is, in the plural, for the note.

    Raises:
        DataError: there is one group only.
    """
    ordered = sorted(set(groups), key=lambda group: (position(group), group))
    if len(ordered) < 2:
        raise DataError(
            f"of the {unit} one is left, which cannot be split into training and validation",
            where="task",
            fix="give more data, or a folder with train and validation files",
        )
    below = sum(position(group) < fraction for group in ordered)
    count = min(max(below, 1), len(ordered) - 1)
    note = (
        f"{count} of {len(ordered)} {unit} validate, chosen by a hash of each "
        f"(validation_fraction {fraction:g})"
    )
    if count != below:
        side = "validation" if below == 0 else "training"
        note += f"; {side} would have been empty, so the nearest one is in it"
    return set(ordered[:count]), note


def check_fraction_unused(fraction: float) -> None:
    """Refuse a share to split off where the data has a validation part.

    Raises:
        UsageError: the share is not the default, so somebody has asked for it.
    """
    if fraction != USUAL_FRACTION:
        raise UsageError(
            f"validation_fraction {fraction:g} has no effect: the data has a validation part",
            where="task.validation_fraction",
            fix="leave it out, or give the training file alone as task.path",
        )
