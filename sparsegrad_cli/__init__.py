"""Fine-tune transformers by training about 1 % of the MLP weights.

The command is ``sparsegrad`` (:mod:`sparsegrad_cli.cli`). From Python:

- :func:`calibrate` computes bases from a model and batches; :func:`load_basis` reads a saved file.
- :mod:`sparsegrad_cli.peft` puts SparseGrad into any model as an adapter of PEFT.
- :func:`use_unpadding` lets an encoder compute the real tokens of its batches only.
- :func:`load_adapter` loads an adapter that ``sparsegrad export --to adapter`` wrote.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from sparsegrad_cli import peft
    from sparsegrad_cli.calibration.basis_file import BasisFile
    from sparsegrad_cli.calibration.calibrate_model import calibrate
    from sparsegrad_cli.models.unpadding import use_unpadding

__all__ = ["calibrate", "load_adapter", "load_basis", "peft", "use_unpadding"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch."""
    if name == "calibrate":
        return import_module("sparsegrad_cli.calibration.calibrate_model").calibrate
    if name == "use_unpadding":
        return import_module("sparsegrad_cli.models.unpadding").use_unpadding
    if name == "peft":
        return import_module("sparsegrad_cli.peft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_basis(path: str | Path) -> BasisFile:
    """Read bases that :func:`calibrate` or ``sparsegrad calibrate`` made and saved.

    Args:
        path: The file ``basis.safetensors``.

    Raises:
        FileFormatError: The file is not a basis file, or is damaged.
    """
    from sparsegrad_cli.calibration.basis_file import read_basis

    return read_basis(Path(path))


def load_adapter(
    folder: str | Path, model: nn.Module | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """Load an exported adapter: :func:`sparsegrad_cli.restore.exported_adapter.load_adapter`."""
    from sparsegrad_cli.restore.exported_adapter import load_adapter as load

    return load(folder, model, trust_remote_code=trust_remote_code)
