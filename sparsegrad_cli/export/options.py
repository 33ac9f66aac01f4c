"""What an export is asked for. Imports no torch: the command line makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The ranks that vLLM makes room for (its --max-lora-rank); other servers take any of them.
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked for.

    Attributes:
        to: ``merged``, ``lora`` or ``adapter``.
        output_dir: RUN/export-<to> by default.
        rank: lora: the most that a target's factors may have.
        server_rank: lora: pad with zeros to one of ``SERVER_RANKS``; cut to the highest.
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
    server_rank: bool = False
