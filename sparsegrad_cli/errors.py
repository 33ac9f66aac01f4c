"""Errors a user can cause, each one readable block: what, where, what to do. Imports nothing.

Exit codes (docs: README, "Exit codes"): 0 done, 1 failed, 2 usage or recipe, 3 out of memory,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class SparsegradError(Exception):
    """Something the user can act on.

    Args:
        what: one sentence, what is wrong.
        where: the file, line and key, or the thing it is about.
        fix: what to do about it.
        more: lines of what else is known.
        details: the same for a program, beside the texts in run.json's ``error``.
    """

    exit_code = 1
    title = "Failed"
    status = "failed"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        more: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix
        self.more = tuple(more)
        self.details = dict(details or {})

    def __str__(self) -> str:
        parts = [self.what, *self.more]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "\n".join(parts)


class DataError(SparsegradError):
    """A data file or data set that cannot be used as it is."""

    title = "Data"


class FileFormatError(SparsegradError):
    """A basis, checkpoint or record that is damaged or of another version."""

    title = "Damaged file"


class DownloadError(SparsegradError):
    """Something must come from the hub and cannot."""

    title = "Cannot download"


class DiskError(SparsegradError):
    """Writing failed; what was on disk before is still whole."""

    title = "Cannot write"


class NonFiniteError(SparsegradError):
    """A loss or a weight is NaN or infinite."""

    title = "Not finite"


class BusyError(SparsegradError):
    """Another process is at work on the same run."""

    exit_code = 2
    title = "In use"


class OutOfMemoryError(SparsegradError):
    """The device ran out of memory."""

    exit_code = 3
    title = "Out of memory"
    status = "out_of_memory"


class InterruptedRunError(SparsegradError):
    """The user pressed Ctrl-C, or the process was asked to end."""

    exit_code = 130
    title = "Interrupted"
    status = "interrupted"


class UsageError(SparsegradError):
    """The command line or the recipe asks for something that cannot be."""

    exit_code = 2
    title = "Usage"


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe.

    Attributes:
        key: dotted path, for example ``train.learning_rate``.
        what: what is wrong.
        file: recipe file, or ``command line``.
        line: 1-based line in that file, where known.
        fix: what to do, where it can be said.
    """

    key: str
    what: str
    file: str | None = None
    line: int | None = None
    fix: str | None = None

    @property
    def where(self) -> str:
        """``file:line: key`` with what is known of it."""
        place = self.file or ""
        if place and self.line is not None:
            place += f":{self.line}"
        return f"{place}: {self.key}" if place else self.key


class RecipeError(UsageError):
    """All that is wrong with a recipe, reported together."""

    title = "Recipe"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = []
        for problem in self.problems:
            line = f"{problem.where}: {problem.what}"
            lines.append(f"{line} ({problem.fix})" if problem.fix else line)
        plural = "" if len(self.problems) == 1 else "s"
        super().__init__(f"{len(self.problems)} problem{plural} in the recipe")
        self.lines = tuple(lines)

    def __str__(self) -> str:
        return "\n".join([self.what, *self.lines])
