"""The options of ``sparsegrad export``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The ranks that vLLM supports (its --max-lora-rank). Other servers support any of them.
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where.

    Attributes:
        to: ``merged``, ``lora`` or ``adapter``.
        output_dir: RUN/export-<to> by default.
        rank: lora: truncate every change to this rank.
        examples: Number of validation rows to compare logits on.
        tolerance: Largest absolute difference of logits; the default allows for rounding.
        overwrite: Replace an earlier export in ``output_dir``.
        server_rank: lora: pad with zeros to one of ``SERVER_RANKS``; truncate to the highest.
    """

    to: str
    output_dir: Path | None = None
    rank: int | None = None
    examples: int = 32
    tolerance: float | None = None
    overwrite: bool = False
    server_rank: bool = False
