"""Fill in the matrix of docs/survival.md: some minutes.

Run it by ``PYTHONPATH=tests python tests/support/survival_table.py``.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.kill_points import MOMENTS
from support.kill_process import REPO, Killer
from support.survival_runs import (
    CALIBRATING,
    EXPORTING,
    METHODS,
    NEEDS_BASIS,
    TRAINING,
    Bench,
    Cell,
)

BEGIN, END = "<!-- the matrix begins -->", "<!-- the matrix ends -->"
THRICE = ("checkpoint-written", "evaluated", "adapter-torn")


def words(cell: Cell) -> str:
    """One field of the table."""
    if not (cell.weights and cell.records):
        return "**differs**"
    if cell.after is None:
        return "same, done"
    return f"same, from {cell.after}" if cell.after else "same"


def rows(bench: Bench) -> Iterator[tuple[str, list[str]]]:
    """What was done to the run, and what became of each method's."""
    for moment in TRAINING:
        skipped = METHODS.keys() - NEEDS_BASIS if moment in CALIBRATING else set()
        fields = ["" if m in skipped else words(bench.cell(m, moment)) for m in METHODS]
        yield MOMENTS[moment][0], fields
    named = ", ".join(MOMENTS[moment][0] for moment in THRICE)
    yield f"killed three times: {named}", [words(bench.cell(m, *THRICE)) for m in METHODS]
    for moment in EXPORTING:
        yield MOMENTS[moment][0], [words(bench.export_cell(m, moment)) for m in METHODS]


def table(bench: Bench) -> list[str]:
    """Markdown."""
    lines = [f"| killed when | {' | '.join(METHODS)} |", f"| :-- |{' :-- |' * len(METHODS)}"]
    for what, fields in rows(bench):
        lines.append(f"| {what} | {' | '.join(fields)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Run all cells, and put the table where the old one is."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as place, Killer() as killer:
        lines = table(Bench(Path(place), killer))
    made = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {os.uname().sysname}, one thread."
    )
    page = REPO / "docs" / "survival.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", made, "", END + after]), "utf-8")


if __name__ == "__main__":
    main()
