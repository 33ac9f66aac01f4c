"""What lies in a run's folder, and whether it can be exported. Imports no torch by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.source import COMMAND_LINE, Place
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.access import dig
from sparsegrad_cli.run.folder import adapter_file, with_current_status

# What may lie elsewhere by now. All else says what was trained, and stays as it was.
_MOVABLE = (
    "model",
    "model.name",
    "model.trust_remote_code",
    "task.path",
    "task.validation_fraction",
    "calibration.basis",
    "train.use_cpu",
)


@dataclass
class RunFiles:
    """A run's folder, looked through.

    Attributes:
        folder: of the run.
        record: run.json.
        loaded: recipe.yaml, with what the command line moved.
        tensors: the file with what was trained.
        source: ``adapter``, or the name of the checkpoint.
        notes: what the user should know about it.
    """

    folder: Path
    record: dict[str, Any]
    loaded: LoadedRecipe
    tensors: Path
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def from_adapter(self) -> bool:
        """Whether the run came to its end and left an adapter."""
        return self.source == "adapter"

    @property
    def owns_basis(self) -> bool:
        """Whether the run made its basis itself."""
        return not self.loaded.recipe.calibration.basis

    @property
    def basis(self) -> tuple[Path, str]:
        """The basis file of the run, and the place to blame."""
        given = self.loaded.recipe.calibration.basis
        if given:
            return Path(given).expanduser(), self.loaded.where("calibration.basis")
        path = self.folder / "basis.safetensors"
        return path, str(path)

    @property
    def target_names(self) -> list[str]:
        """The targets that were trained."""
        listed = self.recorded("counts", "targets")
        rows = listed if isinstance(listed, list) else []
        return [str(row.get("name")) for row in rows if isinstance(row, dict)]

    def recorded(self, block: str, key: str) -> Any:
        """A value of run.json.

        Raises:
            FileFormatError: it is not there.
        """
        return _recorded(self.record, self.folder, block, key)


def open_run(run: Path, overrides: tuple[str, ...] = (), *, data: bool = True) -> RunFiles:
    """Look through a run's folder.

    Args:
        run: the folder, or its run.json.
        overrides: ``key.path=value`` for what lies elsewhere now.
        data: its data must be there.

    Raises:
        UsageError: no run, not a training run, nothing trained yet, an override of what was
            trained, or code that comes with the model and was not asked for.
        FileFormatError: a file of it is missing, damaged, or was changed since.
    """
    folder = run if is_folder(run) else run.parent
    record = with_current_status(load_run(run), folder).to_json()
    if record.get("command") != "train":
        raise UsageError(f"{folder} is a calibration: it has trained nothing")
    if not (folder / "recipe.yaml").is_file():
        raise FileFormatError("the run has no recipe.yaml any more", where=str(folder))
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in _MOVABLE:
            raise UsageError(
                f"{key} cannot be changed after training",
                where="command line",
                fix=f"what may lie elsewhere by now: {', '.join(_MOVABLE[1:])}",
            )
    loaded = _load_recipe(folder / "recipe.yaml", overrides, data=data)
    _check_asked_for(loaded)
    keep_best = loaded.recipe.train.load_best_model_at_end
    tensors, source, notes = _trained(folder, record, keep_best=keep_best)
    _check_unchanged(record, folder, loaded)
    return RunFiles(folder, record, loaded, tensors, source, notes)


def _load_recipe(path: Path, overrides: tuple[str, ...], *, data: bool) -> LoadedRecipe:
    """The recipe; of what has gone since the run, the user is told that it can be named anew."""
    try:
        return load_recipe(path, overrides, data=data)
    except RecipeError as error:
        raise RecipeError(
            [
                replace(problem, fix=f"if it lies elsewhere now, say where: {problem.key}=PATH")
                if problem.key in _MOVABLE and problem.what.startswith("no such")
                else problem
                for problem in error.problems
            ]
        ) from error


def _check_asked_for(loaded: LoadedRecipe) -> None:
    """Refuse code that comes with the model, unless this command asks for it: a run's folder may
    come from anywhere."""
    key = ("model", "trust_remote_code")
    if loaded.recipe.model.trust_remote_code and loaded.places.get(key) != Place(COMMAND_LINE):
        raise UsageError(
            f"{loaded.recipe.model.name} brings code of its own, which is not run unasked",
            where=loaded.where("model.trust_remote_code"),
            fix="if you trust it: model.trust_remote_code=true",
        )


def _trained(
    folder: Path, record: dict[str, Any], *, keep_best: bool
) -> tuple[Path, str, list[str]]:
    """The adapter; of a run that has none the checkpoint that it would have kept so far."""
    status = str(record.get("status"))
    adapter = adapter_file(folder)
    if adapter is not None:
        notes = [] if status == "done" else [f"the run is {status}, but training came to its end"]
        return adapter, "adapter", notes
    from sparsegrad_cli.run.checkpoints import last_checkpoint
    from sparsegrad_cli.training.checkpoint_state import TRAINABLE

    last = last_checkpoint(folder)
    if last is None:
        raise UsageError(
            f"the run in {folder} is {status} and has neither an adapter nor a whole checkpoint",
            fix=f"sparsegrad train {folder} --resume",
        )
    best = _best_checkpoint(folder, last) if keep_best else None
    chosen, what = (best, "best") if best is not None else (last, "last")
    note = (
        f"the run is {status} and has no adapter: {chosen.name} is exported, its {what} checkpoint"
    )
    return chosen / TRAINABLE, chosen.name, [note]


def _best_checkpoint(folder: Path, last: Path) -> Path | None:
    """The checkpoint that the last one names as the best so far, if it is there and whole."""
    from sparsegrad_cli.run.checkpoint_manifest import damage

    try:
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        best = folder / f"checkpoint-{int(state['best_global_step'])}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return best if damage(best) is None else None


def _check_unchanged(record: dict[str, Any], folder: Path, loaded: LoadedRecipe) -> None:
    """Refuse a recipe.yaml that was edited: the adapter would be put into another form.

    Keys that this version knows and the run's did not are left out.
    """
    method = loaded.recipe.method.model_dump(mode="json")
    wanted = dict(_recorded(record, folder, "method", "settings"))
    pairs = {f"method.{key}": (value, method.get(key)) for key, value in wanted.items()}
    pairs["method.name"] = (_recorded(record, folder, "method", "name"), method["name"])
    pairs["scope"] = (_recorded(record, folder, "method", "scope"), loaded.recipe.scope)
    pairs["model.dtype"] = (_recorded(record, folder, "model", "dtype"), loaded.recipe.model.dtype)
    # Runs from before it was a key had none.
    bits = dig(record, "model", "quantization")
    pairs["model.quantization"] = (bits, loaded.recipe.model.quantization)
    pairs["seed"] = (record.get("seed"), loaded.recipe.seed)
    for key, (then, now) in pairs.items():
        if then != now:
            raise FileFormatError(
                f"recipe.yaml was changed since the run: {key} is {now!r}, it was {then!r}",
                where=loaded.where(key),
                fix="put the original value back",
            )


def _recorded(record: dict[str, Any], folder: Path, block: str, key: str) -> Any:
    found = record.get(block)
    if not isinstance(found, dict) or key not in found:
        raise FileFormatError(
            f"run.json is incomplete: {block}.{key} is missing",
            where=str(folder / "run.json"),
            fix="bring it back from a copy, or train again",
        )
    return found[key]
