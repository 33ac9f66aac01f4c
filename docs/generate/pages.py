"""The pages of the reference that are generated, and what writes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.generate import commands, recipe, records

_REFERENCE = Path(__file__).resolve().parents[1] / "reference"

PAGES: dict[Path, Callable[[], str]] = {
    _REFERENCE / "recipe.md": recipe.page,
    _REFERENCE / "commands.md": commands.page,
    _REFERENCE / "records.md": records.page,
}
