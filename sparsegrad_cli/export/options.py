"""What an export is asked for. Imports no torch: the command line makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for.

    Attributes:
        to: ``merged``, ``lora`` or ``adapter``.
        output_dir: RUN/export-<to> by default.
        rank: lora: the most that a target's factors may have.
        examples: validation rows to compare on.
        tolerance: largest absolute difference of logits; by default what rounding explains.
        overwrite: replace an earlier export in output_dir.
    """

    to: str
    output_dir: Path | None = None
    rank: int | None = None
    examples: int = 32
    tolerance: float | None = None
    overwrite: bool = False
