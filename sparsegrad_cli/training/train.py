"""``sparsegrad train``: fine-tune a model by a recipe. Imports no torch itself."""

from __future__ import annotations

from sparsegrad_cli.memory.frozen_gc import frozen_gc
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.run.open_run import open_run


def train(
    loaded: LoadedRecipe,
    observer: Observer | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RunRecord:
    """Run a recipe: load, calibrate if the method needs a basis, train, evaluate, report.

    Args:
        loaded: the recipe.
        observer: receives progress; closed at the end.
        resume: continue the run in the recipe's folder. A finished run is left unchanged.
        overwrite: replace the run that the folder holds.

    Returns:
        The content of run.json.

    Raises:
        SparsegradError: the run failed. Its folder keeps a run.json with the same error, and the
            last checkpoint.
    """
    with open_run(loaded, "train", observer, resume=resume, overwrite=overwrite) as run:
        if not run.done:
            # Imported here: torch takes seconds, and a folder that is refused is refused at once.
            from sparsegrad_cli.training.fine_tuning import fine_tune

            with frozen_gc():
                fine_tune(run)
    return run.writer.record
