"""The repository root, and real data outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def shared_data() -> Path:
    """Return the folder with real GLUE and OpenAssistant files, or skip if it is missing."""
    folder = Path(os.environ.get("SPARSEGRAD_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "glue").is_dir():
        pytest.skip(
            "real GLUE files are not on this machine (set SPARSEGRAD_SHARED_DATA to a folder "
            "that holds glue/CoLA/train.tsv and its siblings)"
        )
    return folder
