"""The table of outcomes of generated cases that docs/explanation/security.md shows."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

PROPERTY = "hostile cases"  # property name in test reports, which xdist sends between processes
_PACKAGES = ("hypothesis", "torch", "transformers", "peft", "safetensors", "pyyaml")


class CaseCounts(NamedTuple):
    """The outcomes of the cases of one property, in one test."""

    what: str
    cases: int
    refused: int
    accepted: int
    tracebacks: int


def summary_table(reports: Iterable[Any]) -> list[str]:
    """Return the Markdown table and versions, or nothing if no report has cases.

    If both the few and the many cases of a property ran, only the many count.
    """
    found: dict[str, CaseCounts] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            tried = CaseCounts(*value) if name == PROPERTY else None
            if tried is not None and tried.cases >= found.get(tried.what, tried).cases:
                found[tried.what] = tried
    if not found:
        return []
    rows = sorted(found.values())
    total = CaseCounts("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    lines = [
        "| property | cases | refused | accepted | tracebacks |",
        "| :-- | --: | --: | --: | --: |",
    ]
    lines += [f"| {row[0]} | {' | '.join(f'{n:,}' for n in row[1:])} |" for row in (*rows, total)]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [*lines, "", f"Python {platform.python_version()}, {versions}."]
