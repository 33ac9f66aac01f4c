"""Open the folder of a training run and check that its model can be rebuilt. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.shipped import missing_recipe
from sparsegrad_cli.recipe.yaml_source import COMMAND_LINE, Place
from sparsegrad_cli.records.run import CalibrationBlock, MethodBlock, ModelBlock, RunRecord
from sparsegrad_cli.records.store import load_run, repair_advice
from sparsegrad_cli.run.folder import adapter_file, with_current_status

# Settings of files that may have moved since the run. All other settings define what was trained.
_MOVABLE = (
    "model",
    "model.name",
    "model.trust_remote_code",
    "task.path",
    "task.mix",
    "task.evaluation",
    "task.validation_fraction",
    "calibration.basis",
    "train.use_cpu",
)
T = TypeVar("T")


@dataclass
class RunFiles:
    """The files of a training run.

    Attributes:
        folder: The run's folder.
        record: Its run.json.
        loaded: Its recipe.yaml, with the overrides of the command line.
        tensors: The file with the trained parameters.
        source: ``adapter``, or the name of the checkpoint that ``tensors`` belongs to.
        notes: What the user should know about the choice of ``tensors``.
    """

    folder: Path
    record: RunRecord
    loaded: LoadedRecipe
    tensors: Path
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def from_adapter(self) -> bool:
        """Whether the run has finished and left an adapter."""
        return self.source == "adapter"

    @property
    def owns_basis(self) -> bool:
        """Whether the run computed its basis itself."""
        return not self.loaded.recipe.calibration.basis

    @property
    def basis(self) -> tuple[Path, str]:
        """The basis file of the run, and its name in error messages."""
        given = self.loaded.recipe.calibration.basis
        if given:
            return Path(given).expanduser(), self.loaded.where("calibration.basis")
        path = self.folder / "basis.safetensors"
        return path, str(path)

    @property
    def basis_digest(self) -> str:
        """The digest of the basis that the run was trained with."""
        calibration = self.record.calibration or CalibrationBlock()
        return self._recorded(calibration.digest, "calibration.digest")

    @property
    def threshold(self) -> float | None:
        """The threshold of a finished run with several labels a row, else None."""
        metrics = self.record.metrics if self.from_adapter else None
        return metrics.best.threshold if metrics is not None and metrics.best else None

    @property
    def target_names(self) -> list[str]:
        """The names of the target modules that were trained."""
        targets = self.record.counts.targets if self.record.counts else []
        return [target.name for target in self._recorded(targets or None, "counts.targets")]

    @property
    def method(self) -> MethodBlock:
        """The method as it was recorded."""
        return self._recorded(self.record.method, "method")

    @property
    def model(self) -> ModelBlock:
        """The base model as it was recorded."""
        return self._recorded(self.record.model, "model")

    @property
    def fingerprint(self) -> str:
        """The digest of the base model's weights in the target modules."""
        return self._recorded(self.model.fingerprint, "model.fingerprint")

    def _recorded(self, value: T | None, key: str) -> T:
        if value is None:
            raise FileFormatError(
                f"run.json is incomplete: {key} is missing",
                where=str(self.folder / "run.json"),
                fix=repair_advice(self.folder / "run.json"),
            )
        return value


def open_run(
    run: Path, overrides: tuple[str, ...] = (), *, data: bool = True, model: bool = True
) -> RunFiles:
    """Open the folder of a training run.

    Args:
        run: The folder, or its run.json.
        overrides: ``key.path=value`` for files that have moved since the run.
        data: Whether its data must be present.
        model: Whether its base model will be loaded, and code that comes with it run.

    Raises:
        UsageError: It is not a training run, has trained nothing yet, or would run code that comes
            with the model; or an override would change what was trained.
        FileFormatError: A file is missing, damaged, or was edited since the run.
    """
    folder = run if is_folder(run) else run.parent
    record = with_current_status(load_run(run), folder)
    if record.command != "train":
        raise UsageError(f"{folder} holds a calibration, which has trained nothing")
    if not (folder / "recipe.yaml").is_file():
        raise missing_recipe(folder)
    _check_overrides(overrides)
    loaded = _load_recipe(folder / "recipe.yaml", overrides, data=data)
    if model:
        _refuse_unasked_code(loaded)
    files = _trained_tensors(folder, record, loaded)
    _check_unchanged(files)
    return files


def _check_overrides(overrides: tuple[str, ...]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in _MOVABLE:
            raise UsageError(
                f"{key} cannot be changed after training",
                where="command line",
                fix=f"these may have moved since: {', '.join(_MOVABLE[1:])}",
            )


def _load_recipe(path: Path, overrides: tuple[str, ...], *, data: bool) -> LoadedRecipe:
    """Load the recipe; if a path in it is missing, the error explains how to give the new one."""
    try:
        return load_recipe(path, overrides, data=data)
    except RecipeError as error:
        problems = [
            replace(problem, fix=f"if it has moved, name its new place: {problem.key}=PATH")
            if problem.key in _MOVABLE and problem.what.startswith("no such")
            else problem
            for problem in error.problems
        ]
        raise RecipeError(problems) from error


def _refuse_unasked_code(loaded: LoadedRecipe) -> None:
    """Refuse code that comes with the model: the run's folder may come from anyone."""
    key = ("model", "trust_remote_code")
    if loaded.recipe.model.trust_remote_code and loaded.places.get(key) != Place(COMMAND_LINE):
        raise UsageError(
            f"{loaded.recipe.model.name} comes with its own code, which is not run by default",
            where=loaded.where("model.trust_remote_code"),
            fix="if you trust it: model.trust_remote_code=true",
        )


def _trained_tensors(folder: Path, record: RunRecord, loaded: LoadedRecipe) -> RunFiles:
    """Find the adapter; for a run without one, find the checkpoint that it would keep."""
    status = record.status
    adapter = adapter_file(folder)
    if adapter is not None:
        notes = [] if status == "done" else [f"the run is {status}, but its training has finished"]
        return RunFiles(folder, record, loaded, adapter, "adapter", notes)
    from sparsegrad_cli.run.checkpoints import TRAINABLE, best_of, damage, last_checkpoint

    last = last_checkpoint(folder)
    if last is None:
        raise UsageError(
            f"the run in {folder} is {status} and has neither an adapter nor a whole checkpoint",
            fix=f"sparsegrad train {folder} --resume",
        )
    chosen, which = last, "last"
    if loaded.recipe.train.load_best_model_at_end:
        best = best_of(last)
        if best is not None and damage(best) is None:
            chosen, which = best, "best"
    note = f"the run is {status} and has no adapter; its {which} checkpoint, {chosen.name}, is used"
    return RunFiles(folder, record, loaded, chosen / TRAINABLE, chosen.name, [note])


def _check_unchanged(files: RunFiles) -> None:
    """Refuse a recipe.yaml that was edited after the run, since the adapter would not fit it.

    Settings of the method that the run's version did not have are not compared.
    """
    recipe, record = files.loaded.recipe, files.record
    method = recipe.method.model_dump(mode="json")
    pairs = {
        f"method.{key}": (value, method.get(key)) for key, value in files.method.settings.items()
    }
    pairs |= {
        "method.name": (files.method.name, method["name"]),
        "scope": (files.method.scope, recipe.scope),
        "model.dtype": (files.model.dtype, recipe.model.dtype),
        "model.quantization": (files.model.quantization, recipe.model.quantization),
        "seed": (record.seed, recipe.seed),
    }
    for key, (then, now) in pairs.items():
        if then != now:
            raise FileFormatError(
                f"recipe.yaml was changed since the run: {key} is {now!r}, it was {then!r}",
                where=files.loaded.where(key),
                fix="put the original value back",
            )
