"""Define the errors that a user can act on: what is wrong, where, what to do. No imports.

Exit codes: 0 done, 1 failed, 2 wrong command line, recipe or data, 3 out of memory,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class SparsegradError(Exception):
    """An error that the user can act on.

    Args:
        what: What was expected and what came, in one sentence.
        where: The file, line and key, or the option.
        fix: What to do.
        more: Further lines of information.
        details: Information for programs, written beside the texts into run.json's ``error``.
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
    """A data file or data set cannot be used as it is."""

    exit_code = 2
    title = "Data"


class FileFormatError(SparsegradError):
    """A basis, checkpoint or record is damaged or of another version."""

    title = "Damaged file"


class DownloadError(SparsegradError):
    """A download from the hub failed."""

    title = "Cannot download"


class UploadError(SparsegradError):
    """An upload to the hub was refused or failed; files on this machine are intact."""

    title = "Cannot upload"


class DiskError(SparsegradError):
    """A file could not be written; existing files are intact."""

    title = "Cannot write"


class NonFiniteError(SparsegradError):
    """A loss or a weight is NaN or infinite."""

    title = "Not finite"


class BusyError(SparsegradError):
    """Another process uses the same run."""

    exit_code = 2
    title = "In use"


class OutOfMemoryError(SparsegradError):
    """The device ran out of memory."""

    exit_code = 3
    title = "Out of memory"
    status = "out_of_memory"


class InterruptedRunError(SparsegradError):
    """The run was stopped by Ctrl-C or SIGTERM."""

    exit_code = 130
    title = "Interrupted"
    status = "interrupted"


class UsageError(SparsegradError):
    """The command line or the recipe is wrong."""

    exit_code = 2
    title = "Usage"


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe.

    Attributes:
        key: Dotted path, for example ``train.learning_rate``.
        what: What is wrong.
        file: The recipe file, or ``command line``.
        line: The 1-based line in that file, where known.
        fix: What to do, where known.
    """

    key: str
    what: str
    file: str | None = None
    line: int | None = None
    fix: str | None = None

    @property
    def where(self) -> str:
        """``file:line: key``, as far as it is known."""
        place = self.file or ""
        if place and self.line is not None:
            place += f":{self.line}"
        return f"{place}: {self.key}" if place else self.key


class RecipeError(UsageError):
    """All problems of a recipe, reported together."""

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
