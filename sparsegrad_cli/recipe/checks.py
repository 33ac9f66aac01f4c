"""What can be known wrong before torch is imported: names and files. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from sparsegrad_cli.errors import Problem, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import (
    exists,
    expanded,
    from_here,
    is_file,
    is_folder,
    looks_like_folder,
    near_folder,
)
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.quantization import quantization_problems
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.tasks import check_settings, known_task_names
from sparsegrad_cli.recipe.training import training_problems
from sparsegrad_cli.recipe.yaml_source import KeyPath, Place, clip, dotted, find_place

BUILTIN_MODELS = ("builtin:minilm", "builtin:smollm2")
_FILE_TASKS = ("csv", "json", "parquet")


def outside_problems(
    recipe: Recipe, places: Mapping[KeyPath, Place], *, data: bool = True
) -> list[Problem]:
    """Unknown task or built-in model, files that are not there, what no training can do.

    Args:
        data: the task's files count, too.
    """
    found: list[tuple[KeyPath, str, str | None]] = []
    task = recipe.task
    names = known_task_names()
    if task.name not in names:
        found.append((("task", "name"), f"unknown task {task.name!r}", suggest(task.name, names)))
    elif task.name in _FILE_TASKS and task.path is None:
        fix = f"give task.path: the {task.name} file, or a folder with train and validation files"
        found.append((("task", "path"), f"is missing for task {task.name}", fix))
    elif task.name == "chat" and task.path is None and not (task.chat and task.chat.hub):
        fix = "give task.path (a file or folder) or task.chat.hub (owner/name)"
        found.append((("task", "path"), "is missing for task chat", fix))
    try:
        check_settings(task)
    except UsageError as error:
        found.append((tuple((error.where or "task").split(".")), error.what, error.fix))
    if data and task.path is not None and not exists(task.path):
        found.append((("task", "path"), f"no such file or folder: {from_here(task.path)}", None))
    forgetting = task.chat.forgetting if task.chat else None
    if data and forgetting is not None and not is_file(forgetting):
        found.append(
            (("task", "chat", "forgetting"), f"no such file: {from_here(forgetting)}", None)
        )
    model = recipe.model.name
    if model.startswith("builtin:") and model not in BUILTIN_MODELS:
        what = f"unknown built-in model {model!r}"
        found.append((("model", "name"), what, suggest(model, BUILTIN_MODELS)))
    elif not is_folder(model) and (problem := _missing_model(recipe, places)):
        found.append(problem)
    basis = recipe.calibration.basis
    if basis is not None and not is_file(basis):
        fix = "`sparsegrad calibrate` writes one"
        found.append((("calibration", "basis"), f"no such file: {from_here(basis)}", fix))
    if data and recipe.init_from is not None and not _is_adapter(recipe.init_from):
        what = f"expected a folder with run.json or adapter_config.json: {recipe.init_from}"
        found.append((("init_from",), what, "name a run's folder or a PEFT LoRA folder"))
    elif data and (differs := _other_start(recipe)):
        fix = "set the same in this recipe; or export it with `--to merged` and set model to it"
        found.append((("init_from",), differs, fix))
    if recipe.output_dir is not None and str(expanded(recipe.output_dir)).startswith("~"):
        found.append((("output_dir",), f"there is no such home: {recipe.output_dir}", None))
    found += [*quantization_problems(recipe), *training_problems(recipe)]
    problems = []
    for path, what, advice in found:
        place = find_place(places, path)
        problems.append(Problem(dotted(path), clip(what), place.file, place.line, advice))
    return problems


def _missing_model(
    recipe: Recipe, places: Mapping[KeyPath, Place]
) -> tuple[KeyPath, str, str | None] | None:
    """Return the problem of a model's name that means a folder, and there is none."""
    name, path = recipe.model.name, ("model", "name")
    written = find_place(places, path).file
    near = near_folder(name, expanded(written).parent)
    if looks_like_folder(name):
        fix = near or "a hub id has at most one slash and no leading dot"
        return path, f"no such folder: {from_here(name)}", fix
    if "/" in name and near and recipe.model.revision is None:
        fix = f"{near} For a model of that name on the hub, say model.revision: main"
        return path, f"no such folder: {name}", fix
    return None


def _is_adapter(name: str) -> bool:
    folder = expanded(name)
    inside = folder.name == "adapter" and is_file(folder.parent / "run.json")
    return inside or is_file(folder / "run.json") or is_file(folder / "adapter_config.json")


def _other_start(recipe: Recipe) -> str | None:
    """Return how the adapter that `recipe.init_from` names was trained otherwise, by its JSON.

    Settings that only its tensors or the model tell are compared when training loads them.
    """
    if recipe.init_from is None or not recipe.method.beside_weights:
        return None
    folder = expanded(recipe.init_from)
    if folder.name == "adapter" and is_file(folder.parent / "run.json"):
        folder = folder.parent
    ours = recipe.method
    now: dict[str, object] = {"method.name": ours.name, "scope": recipe.scope}
    then: dict[str, object]
    try:
        if is_file(folder / "run.json"):
            method = plain_json((folder / "run.json").read_bytes())["method"]
            then = {"method.name": method["name"], "scope": method["scope"]}
            said = method["settings"] if method["name"] == ours.name else {}
        else:
            config = plain_json((folder / "adapter_config.json").read_bytes())
            if config["peft_type"] != ours.peft_type:
                shown = from_here(recipe.init_from)
                what = f"{shown} is a PEFT adapter of type {config['peft_type']:.60}"
                return f"{what}, and method is {ours.name}"
            then, said = {}, ours.from_peft(config)
        settings = ours.model_dump(exclude={"name", *ours.training_only})
        for key, value in settings.items():
            # What one of the two leaves open is compared when the tensors are loaded.
            if value is not None and said.get(key) is not None:
                now[f"method.{key}"], then[f"method.{key}"] = value, said[key]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # damaged or not finished: reading its tensors says how
    differing = [key for key in then if then[key] != now[key]]
    if not differing:
        return None
    told = "; ".join(f"{key} is {now[key]} here, and was {then[key]}" for key in differing)
    return f"{from_here(recipe.init_from)} was trained otherwise: {told}"
