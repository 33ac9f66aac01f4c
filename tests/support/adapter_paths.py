"""The path of a finished run's adapter, for every method."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.run.folder import adapter_file


def adapter_path(run: Path) -> Path:
    """Return the file with the trained tensors of a finished run."""
    found = adapter_file(run)
    assert found is not None, f"{run} has no adapter"
    return found
