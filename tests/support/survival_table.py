"""Compute the matrix of docs/how-to/resume.md, in some minutes.

Run ``PYTHONPATH=tests python tests/support/survival_table.py``.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.kill_points import KILL_POINTS
from support.kill_process import REPO, ForkServer
from support.survival_runs import (
    CALIBRATION_POINTS,
    EXPORT_POINTS,
    METHODS,
    NEEDS_BASIS,
    TRAINING_POINTS,
    Recovery,
    Workspace,
)

BEGIN, END = "<!-- the matrix begins -->", "<!-- the matrix ends -->"
THREE_KILLS = ("checkpoint-written", "evaluated", "adapter-torn")


def cell_text(cell: Recovery) -> str:
    """Return one cell of the table."""
    if not (cell.weights and cell.records):
        return "**differs**"
    if cell.after is None:
        return "same, done"
    return f"same, from {cell.after}" if cell.after else "same"


def rows(workspace: Workspace) -> Iterator[tuple[str, list[str]]]:
    """Yield the description of each kill point and the outcome for each method."""
    for point in TRAINING_POINTS:
        skipped = METHODS.keys() - NEEDS_BASIS if point in CALIBRATION_POINTS else set()
        fields = [
            "" if m in skipped else cell_text(workspace.kill_and_resume(m, point)) for m in METHODS
        ]
        yield KILL_POINTS[point][0], fields
    named = ", ".join(KILL_POINTS[point][0] for point in THREE_KILLS)
    yield (
        f"killed three times: {named}",
        [cell_text(workspace.kill_and_resume(m, *THREE_KILLS)) for m in METHODS],
    )
    for point in EXPORT_POINTS:
        yield (
            KILL_POINTS[point][0],
            [cell_text(workspace.kill_and_repeat_export(m, point)) for m in METHODS],
        )


def table(workspace: Workspace) -> list[str]:
    """Return the table in Markdown."""
    lines = [f"| killed when | {' | '.join(METHODS)} |", f"| :-- |{' :-- |' * len(METHODS)}"]
    for what, fields in rows(workspace):
        lines.append(f"| {what} | {' | '.join(fields)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Compute all cells, and replace the table in the page."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as place, ForkServer() as fork_server:
        lines = table(Workspace(Path(place), fork_server))
    made = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {os.uname().sysname}, one thread."
    )
    page = REPO / "docs" / "how-to" / "resume.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", made, "", END + after]), "utf-8")


if __name__ == "__main__":
    main()
