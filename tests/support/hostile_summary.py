"""The table of what became of generated cases, as docs/hostile.md has it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

PROPERTY = "hostile cases"  # of a test's report, which also comes from other processes
_PACKAGES = ("hypothesis", "torch", "transformers", "peft", "safetensors", "pyyaml")


class Tried(NamedTuple):
    """What became of the cases of one property, in one test."""

    what: str
    cases: int
    refused: int
    accepted: int
    tracebacks: int


def table(reports: Iterable[Any]) -> list[str]:
    """Markdown, and the versions; empty where no report tells of cases.

    The few cases of a property are not counted where its many have run, too.
    """
    found: dict[str, Tried] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            tried = Tried(*value) if name == PROPERTY else None
            if tried is not None and tried.cases >= found.get(tried.what, tried).cases:
                found[tried.what] = tried
    if not found:
        return []
    rows = sorted(found.values())
    total = Tried("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    lines = [
        "| property | cases | refused | accepted | tracebacks |",
        "| :-- | --: | --: | --: | --: |",
    ]
    lines += [f"| {row[0]} | {' | '.join(f'{n:,}' for n in row[1:])} |" for row in (*rows, total)]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [*lines, "", f"Python {platform.python_version()}, {versions}."]
