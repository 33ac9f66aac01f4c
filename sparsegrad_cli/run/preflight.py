"""Refuse a recipe early for reasons that a run would otherwise find only after loading.

Data files of a few megabytes are read as training reads them. In larger files, only the columns are
checked. Imports no torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparsegrad_cli import distributed
from sparsegrad_cli.data.questions import read_prompts
from sparsegrad_cli.data.text_files import COMPRESSIONS, heads_only
from sparsegrad_cli.data.text_tokens import fitting_length
from sparsegrad_cli.errors import DataError, Problem, RecipeError, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import expanded, is_file, is_folder
from sparsegrad_cli.models.pretrained import refuse_other_weights
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.optimizers import INSTALL_BITSANDBYTES, OPTIMIZERS
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.recipe.tasks import CHAT_TASKS, with_metric
from sparsegrad_cli.recipe.trackers import missing_package, named
from sparsegrad_cli.recipe.yaml_source import find_place

_WHOLE_BYTES = 4 * 2**20  # Files up to this size are read completely.
_HEAD_BYTES = 2**18  # Of larger files, only this many bytes are read.
_PACKED = 20  # Assumed compression ratio of compressed files.


def check(loaded: LoadedRecipe, *, trains: bool) -> None:
    """Refuse a recipe whose packages, data or model folder cannot be used.

    Args:
        loaded: the recipe.
        trains: whether the command trains, and so uses trackers.

    Raises:
        RecipeError: packages are not installed; names all of them.
        UsageError: a column is not in the file; names the place of the key.
        DataError: a file that is small enough to be read completely has an error.
        FileFormatError: the model's folder has weights in a format that is not supported.
    """
    recipe, problems = loaded.recipe, []
    for name in named(recipe.train.report_to) if trains else ():
        package = missing_package(name)
        if package is not None:
            what = f"expected the tracker {name}, whose package is not installed"
            fix = f"pip install {package}, or train.report_to: none"
            problems.append(("train.report_to", what, fix))
    if trains and recipe.train.report_to == "all" and not named("all"):
        what = "'all' stands for the trackers that are installed, and none is"
        problems.append(("train.report_to", what, "pip install 'sparsegrad[tensorboard]', or none"))
    if importlib.util.find_spec("bitsandbytes") is None:
        what = "expected bitsandbytes, which {}; it is not installed"
        if recipe.model.quantization:
            problem = what.format("holds weights in 8 or 4 bits")
            problems.append(("model.quantization", problem, INSTALL_BITSANDBYTES))
        if trains and OPTIMIZERS[recipe.train.optim].of_bitsandbytes:
            problem = what.format(f"provides the optimizer {recipe.train.optim}")
            problems.append(("train.optim", problem, INSTALL_BITSANDBYTES))
    if problems:
        raise RecipeError([_placed(loaded, *problem) for problem in problems])
    if is_folder(recipe.model.name):
        refuse_other_weights(expanded(recipe.model.name), recipe.model.name)
    try:
        _check_files(recipe)
        if recipe.train.sample_prompts is not None:
            read_prompts(recipe.train.sample_prompts)
    except UsageError as error:
        if error.where and error.where.startswith(("task.", "train.")):
            error.where = loaded.where(error.where)
        raise


def check_study(study: LoadedStudy) -> None:
    """Check the recipes of a study, once for recipes that :func:`check` cannot tell apart."""
    seen = set()
    for cell in study.cells:
        recipe = cell.loaded.recipe
        train = recipe.train
        looked_at = (recipe.task, train.report_to, train.class_weights, recipe.model.quantization)
        if str(looked_at) not in seen:
            seen.add(str(looked_at))
            check(cell.loaded, trains=True)


def notes(loaded: LoadedRecipe) -> list[str]:
    """Return the notes on the recipe that need no weights, from settings and model's files."""
    found = [*loaded.recipe.method.notes]
    config = _config(loaded.recipe.model.name)
    if config is None:
        return found
    note = fitting_length(loaded.recipe.task.max_length, config)[1]
    return found if note is None else [*found, note]


def _placed(loaded: LoadedRecipe, key: str, what: str, fix: str) -> Problem:
    place = find_place(loaded.places, tuple(key.split(".")))
    return Problem(key, what, place.file, place.line, fix)


def _check_files(recipe: Recipe) -> None:
    section = recipe.task
    named = [*section.train_paths, *(section.evaluation or {}).values()]
    if not section.train_paths:
        return
    if all(_is_small(expanded(path)) for path in named):
        _read(recipe)
        return
    from sparsegrad_cli.data.load_task import check_file_columns

    try:
        with heads_only(_HEAD_BYTES):
            check_file_columns(section)
    except DataError:
        return  # The head may end within a record. Training reports errors in the file.


def _is_small(path: Path) -> bool:
    files = [path] if path.is_file() else [each for each in path.glob("*") if each.is_file()]
    sizes = (
        each.stat().st_size * (_PACKED if each.name.lower().endswith(COMPRESSIONS) else 1)
        for each in files
    )
    return sum(sizes) <= _WHOLE_BYTES


def _read(recipe: Recipe) -> None:
    """Read small files as training does, to find errors; the data is dropped."""
    from sparsegrad_cli.data.class_weights import class_weights
    from sparsegrad_cli.data.load_task import load_chat, read_task

    task = recipe.task
    if task.name in CHAT_TASKS:
        load_chat(task)
        return
    raw = read_task(task)
    spec = with_metric(raw.spec, task.metric, task.positive_label)
    class_weights(recipe.train.class_weights, spec, raw.train.first(task.train_limit).label)


def _config(model: str) -> Any:
    """Return the configuration of a model in a local folder, as attributes; None without one."""
    path = expanded(model) / "config.json"
    if not is_file(path):
        return None
    try:
        found = plain_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return SimpleNamespace(**found) if isinstance(found, dict) else None


def check_calibration_share(loaded: LoadedRecipe, command: str) -> None:
    """Refuse more processes than calibration steps, because each process needs at least one.

    Raises:
        UsageError: there are fewer steps than processes.
    """
    recipe, processes = loaded.recipe, distributed.world_size()
    calibrates = recipe.method.calibrates and recipe.calibration.basis is None
    if (calibrates or command == "calibrate") and recipe.calibration.steps < processes:
        raise UsageError(
            f"{processes} processes cannot share {recipe.calibration.steps} calibration steps",
            where=loaded.where("calibration.steps"),
            fix=f"calibration.steps={processes} or more",
        )
