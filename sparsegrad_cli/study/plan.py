"""What a comparison would run, without running it."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.recipe.load_recipe import to_plain
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.study.parity import check_parity


def plan_of(study: LoadedStudy) -> dict[str, Any]:
    """The record of ``compare --dry-run``.

    Returns:
        ``name``, ``match``, ``seeds``, ``cells`` (how many), ``trials`` (of tuning, for each row;
        null without), ``parity``, ``budget`` (null without one), and ``rows``: task, method and
        resolved recipe of each, the first seed's, as it is before tuning.

    Raises:
        RecipeError: methods differ in more than themselves and what their budget has set.
    """
    first = study.study.seeds[0]
    return {
        "name": study.study.name,
        "match": study.study.match,
        "seeds": list(study.study.seeds),
        "cells": len(study.cells),
        "trials": study.study.tune.trials if study.study.tune is not None else None,
        "parity": check_parity(study),
        "budget": study.budget,
        "rows": [
            {"task": cell.task, "method": cell.label, "recipe": to_plain(cell.loaded.recipe)}
            for cell in study.cells
            if cell.seed == first
        ],
    }
