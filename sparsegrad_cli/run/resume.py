"""Check that a run can be resumed with a recipe: its own, or one that only trains longer.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.io.paths import exists, is_file, refuse_link
from sparsegrad_cli.recipe.load_recipe import digest, leaves, load_recipe, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.shipped import missing_recipe, restore_advice
from sparsegrad_cli.records.run import Extension
from sparsegrad_cli.records.store import load_run

EPOCHS, STEPS = "train.num_train_epochs", "train.max_steps"
_OTHER_FOLDER = "name another output_dir to train from the start"


def check_resumable(path: Path, recipe: Recipe) -> Extension | None:
    """Check that the run in a folder can be resumed with a recipe.

    Returns:
        None for the run's own recipe. For a recipe that trains longer, the run's settings so far.

    Raises:
        UsageError: there is no run, another key differs, or the run would become shorter.
        FileFormatError: the run's files are damaged.
    """
    for name in ("adapter", "steps.jsonl"):  # These are written in place.
        refuse_link(path / name, path)
    steps = path / "steps.jsonl"
    if exists(steps) and not is_file(steps):
        raise UsageError(f"{steps} is not a file", where=str(steps), fix="remove it")
    recorded = _recorded_digest(path)
    return None if recorded == digest(recipe) else _extension(path, recorded, recipe)


def _recorded_digest(path: Path) -> str | None:
    """Return the digest of the recipe that a run was started with, or was last extended by.

    A run that was killed before its first record has only a recipe.
    """
    recipe = path / "recipe.yaml"
    if (path / "run.json").is_file():
        return load_run(path).recipe_digest
    if not recipe.is_file():
        raise UsageError(f"{path} holds no run to resume", where="output_dir")
    return digest(_load(recipe))


def _load(file: Path) -> Recipe:
    if not is_file(file):
        raise missing_recipe(file.parent)
    try:
        return load_recipe(file, data=False).recipe
    except RecipeError as error:
        raise FileFormatError(
            f"recipe.yaml is damaged: {error.lines[0]}",
            where=str(file),
            fix=restore_advice(file.parent),
        ) from error


def _extension(path: Path, recorded: str | None, recipe: Recipe) -> Extension:
    """Return the run's settings before it is extended; refuse any other change."""
    before = _load(path / "recipe.yaml")
    then, now = dict(leaves(to_plain(before))), dict(leaves(to_plain(recipe)))
    differing = [
        key
        for key in sorted({*then, *now} - {"output_dir"})
        if key not in then or key not in now or then[key] != now[key]
    ]
    if digest(before) != recorded:
        raise UsageError(
            "recipe.yaml is not the recipe that the run was started with: its digest is "
            f"{digest(before)[:12]}, and run.json names {(recorded or 'none')[:12]}",
            where=str(path / "recipe.yaml"),
            fix=restore_advice(path),
        )
    if not differing or not {*differing} <= {EPOCHS, STEPS}:
        others = [key for key in differing if key not in (EPOCHS, STEPS)]
        shown = "".join(f"; {k} was {then.get(k)!r}, now {now.get(k)!r}" for k in others[:5])
        raise UsageError(
            f"the run in {path} was started with another recipe{shown}",
            where="output_dir",
            fix=f"sparsegrad train {path} --resume; {EPOCHS} and {STEPS} may grow. For other "
            "changes, another output_dir",
        )
    for key in differing:
        _check_longer(path, key, then, now)
    return Extension(
        recipe_digest=recorded,
        num_train_epochs=before.train.num_train_epochs,
        max_steps=before.train.max_steps,
    )


def _check_longer(path: Path, key: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    by_steps = now[STEPS] > 0
    if key == EPOCHS and by_steps:
        raise UsageError(
            f"{EPOCHS} has no effect: {STEPS} is {now[STEPS]}", where=EPOCHS, fix=f"raise {STEPS}"
        )
    if key == STEPS and not by_steps:
        raise UsageError(
            f"the run was started with {STEPS} {then[STEPS]}, and is extended by it",
            where=STEPS,
            fix=f"a larger {STEPS}; {_OTHER_FOLDER}",
        )
    if key == STEPS and then[STEPS] <= 0:  # The number of steps replaces the number of epochs.
        then = {STEPS: _total_steps(path)}
    if then[key] > now[key]:
        raise UsageError(
            f"a run can be extended, not shortened: {key} was {then[key]}, now {now[key]}",
            where=key,
            fix=f"a larger value; {_OTHER_FOLDER}",
        )


def _total_steps(path: Path) -> int:
    """Return the total steps of the run from its newest checkpoint; 0 without a checkpoint."""
    from sparsegrad_cli.run.checkpoint_state import read_state
    from sparsegrad_cli.run.checkpoints import last_checkpoint

    last = last_checkpoint(path)
    return 0 if last is None else read_state(last).progress.max_steps
