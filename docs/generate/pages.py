"""The pages that are generated, or in part, and what writes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.generate import commands, readme, recipe, records

_REFERENCE = Path(__file__).resolve().parents[1] / "reference"

PAGES: dict[Path, Callable[[], str]] = {
    _REFERENCE / "recipe.md": recipe.page,
    _REFERENCE / "commands.md": commands.page,
    _REFERENCE / "records.md": records.page,
    readme.README: readme.page,
}
