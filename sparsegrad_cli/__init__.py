"""Fine-tune transformers by training about 1 % of the MLP weights.

The command is ``sparsegrad`` (:mod:`sparsegrad_cli.cli`). Data flows one way:
recipe -> model + data -> method -> training -> run records -> report.
:func:`load_adapter` loads an adapter that ``sparsegrad export --to adapter`` wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load_adapter(
    folder: str | Path, model: nn.Module | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """Load an exported adapter: :func:`sparsegrad_cli.restore.exported_adapter.load_adapter`."""
    from sparsegrad_cli.restore.exported_adapter import load_adapter as load

    return load(folder, model, trust_remote_code=trust_remote_code)
