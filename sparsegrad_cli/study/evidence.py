"""All that a comparison says of its cells; a function of the cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.report.access import block, mappings
from sparsegrad_cli.study.budget_report import with_measured
from sparsegrad_cli.study.checks import make_checks
from sparsegrad_cli.study.pairs import pair_tests
from sparsegrad_cli.study.rows import make_rows


def evidence(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``rows``, ``tests`` and ``checks`` of compare.json."""
    return {"rows": make_rows(cells), "tests": pair_tests(cells), "checks": make_checks(cells)}


def up_to_date(compare: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its evidence made anew: an older version's says less.

    A record whose cells cannot be told apart keeps what it says.
    """
    cells = mappings(compare, "cells")
    told = all(
        isinstance(cell.get("seed"), int)
        and all(isinstance(cell.get(key), str) for key in ("task", "method", "status"))
        for cell in cells
    )
    if not cells or not told:
        return dict(compare)
    budget = block(compare, "budget")
    spent = {"budget": with_measured(budget, cells)} if budget else {}
    return {**compare, **spent, **evidence(cells)}
