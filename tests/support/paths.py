"""Where tests find things outside the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def shared_data() -> Path:
    """Folder with real GLUE and OpenAssistant files, or skip: it is not part of the project."""
    folder = Path(os.environ.get("SPARSEGRAD_SHARED_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "glue").is_dir():
        pytest.skip(
            "real GLUE files are not on this machine (set SPARSEGRAD_SHARED_DATA to a folder "
            "that holds glue/CoLA/train.tsv and its siblings)"
        )
    return folder
