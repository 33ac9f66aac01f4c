"""A run that is resumed to train longer than its recipe said: which changes that allows.

More epochs or more steps are; any other key makes another run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe, to_plain
from sparsegrad_cli.recipe.schema import Recipe

EPOCHS, STEPS = "train.num_train_epochs", "train.max_steps"
_ANOTHER = "another output_dir trains it from the start"


def extension(path: Path, recorded: str | None, recipe: Recipe) -> dict[str, Any]:
    """Return what the run in ``path`` was before it is extended, for its record.

    Args:
        path: the run's folder.
        recorded: digest of the recipe that the run was started with, or last extended by.
        recipe: the one that it is resumed with, which has another digest.

    Returns:
        ``recipe_digest``, ``num_train_epochs`` and ``max_steps`` so far.

    Raises:
        UsageError: another key differs, or the run would not be longer.
        FileFormatError: recipe.yaml is damaged, or is not of this run.
    """
    file = path / "recipe.yaml"
    try:
        was = load_recipe(file, data=False).recipe
    except RecipeError as error:
        raise FileFormatError("recipe.yaml is damaged", where=str(file)) from error
    then, now = dict(_leaves(to_plain(was))), dict(_leaves(to_plain(recipe)))
    differing = [
        key
        for key in sorted({*then, *now} - {"output_dir"})
        if key not in then or key not in now or then[key] != now[key]
    ]
    if digest(was) != recorded or not differing or not {*differing} <= {EPOCHS, STEPS}:
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
    return {
        "recipe_digest": recorded,
        "num_train_epochs": was.train.num_train_epochs,
        "max_steps": was.train.max_steps,
    }


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
            fix=f"a larger {STEPS}; {_ANOTHER}",
        )
    if key == STEPS and then[STEPS] <= 0:  # steps take the place of epochs
        then = {STEPS: _steps_of(path)}
    if then[key] > now[key]:
        raise UsageError(
            f"a run can be extended, not shortened: {key} was {then[key]}, now {now[key]}",
            where=key,
            fix=f"a larger value; {_ANOTHER}",
        )


def _steps_of(path: Path) -> int:
    """Return how many steps the run in ``path`` had in all, by its newest checkpoint; 0 without."""
    from sparsegrad_cli.run.checkpoints import last_checkpoint, trainer_state

    last = last_checkpoint(path)
    steps = trainer_state(last).get("max_steps") if last is not None else 0
    return steps if isinstance(steps, int) else 0


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value
