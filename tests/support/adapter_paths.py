"""Where a run of any method keeps what it has trained."""

from __future__ import annotations

from pathlib import Path

from sparsegrad_cli.run.folder import adapter_file


def trained_in(run: Path) -> Path:
    """The file with the tensors of a run that is done."""
    found = adapter_file(run)
    assert found is not None, f"{run} has no adapter"
    return found
