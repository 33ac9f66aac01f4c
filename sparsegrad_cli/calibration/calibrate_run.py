"""``sparsegrad calibrate``: compute a basis and measure its quality. Imports no torch itself."""

from __future__ import annotations

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.memory.frozen_gc import frozen_gc
from sparsegrad_cli.methods.registry import DEFAULT_METHOD
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.records.run import RunRecord
from sparsegrad_cli.run.open_run import open_run


def calibrate_run(
    loaded: LoadedRecipe, observer: Observer | None = None, *, overwrite: bool = False
) -> RunRecord:
    """Compute basis.safetensors for a recipe, with a table and plots of its quality.

    Args:
        loaded: the recipe.
        observer: receives progress; closed at the end.
        overwrite: replace the run that the folder holds.

    Returns:
        The content of run.json.

    Raises:
        UsageError: the method uses no basis, or the recipe names an existing one.
        SparsegradError: the run failed; run.json holds the same error.
    """
    recipe = loaded.recipe
    if not recipe.method.calibrates:
        raise UsageError(
            f"calibrate makes a basis, and method {recipe.method.name} needs none",
            where=loaded.where("method.name"),
            fix=f"method.name: {DEFAULT_METHOD.name}",
        )
    if recipe.calibration.basis is not None:
        raise UsageError(
            f"calibrate makes a basis, and the recipe names one: {recipe.calibration.basis}",
            where=loaded.where("calibration.basis"),
            fix="calibration.basis=null makes another; train uses the one that is named",
        )
    with open_run(loaded, "calibrate", observer, overwrite=overwrite) as run:
        # Imported here, because torch takes seconds to import and a bad folder is refused at once.
        from sparsegrad_cli.calibration.measure_basis import make_and_measure_basis

        with frozen_gc():
            make_and_measure_basis(run)
    return run.writer.record
