"""A recipe timed in a process of its own, as a cell runs in one: how many steps seconds have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsegrad_cli.budget.solve import Pick, UnreachableError
from sparsegrad_cli.compare.crew import shared_cores
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.estimate.session import changed
from sparsegrad_cli.recipe.loading import LoadedRecipe, to_plain
from sparsegrad_cli.recipe.yaml_text import dump

_MODULE = "sparsegrad_cli.budget.stopwatch"


def solve_seconds(loaded: LoadedRecipe, seconds: float, jobs: int) -> Pick:
    """The recipe with as many steps as ``seconds`` of training and calibration have.

    Args:
        jobs: cells that will run at once, and recipes that are timed at once.

    Raises:
        UnreachableError: calibration and the first two steps take longer.
        SparsegradError: the recipe does not run.
    """
    return as_timed(loaded, _timed(loaded, seconds, jobs))


def as_timed(loaded: LoadedRecipe, found: dict[str, Any]) -> Pick:
    """The recipe with the steps that were found (:meth:`Stopwatch.timed`).

    Raises:
        UnreachableError: there are none.
    """
    if not found["steps"]:
        takes = found["calibrate_s"] + found["start_s"]
        raise UnreachableError(takes, "calibration with the first two steps", "")
    steps = found["steps"]
    recipe = changed(loaded, "train", max_steps=steps)
    timed = {key: value for key, value in found.items() if key != "predicted"}
    return Pick(recipe, f"{steps:,} steps", found["predicted"], timed=timed)


def _timed(loaded: LoadedRecipe, seconds: float, jobs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sparsegrad-") as place:
        recipe, result = Path(place) / "recipe.yaml", Path(place) / "result.json"
        plain = {**to_plain(loaded.recipe), "output_dir": str(Path(place) / "run")}
        recipe.write_text(dump(plain), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", _MODULE, str(recipe), str(seconds), str(result)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | shared_cores(jobs),
            check=False,
        )
        found: dict[str, Any] = {}
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
    error = found.get("error")
    if error:
        raise SparsegradError(error["what"], where=error["where"], fix=error["fix"])
    if done.returncode or not found:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise SparsegradError(
            f"its steps could not be timed: the process ended with {done.returncode} ({last})",
            fix="`sparsegrad train` on the same recipe says more",
        )
    return found
