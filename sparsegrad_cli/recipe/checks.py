"""Check what the schema of a recipe cannot: names, files, and settings that exclude each other.

These checks need no torch and no model, so a user learns of all problems at once and early.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

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
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import (
    CHAT_TASKS,
    FILE_TASKS,
    GLUE_TASKS,
    SCORE_METRICS,
    check_settings,
    known_task_names,
)
from sparsegrad_cli.recipe.trackers import TRACKERS
from sparsegrad_cli.recipe.yaml_source import KeyPath, Place, clip, dotted, find_place

BUILTIN_QUESTIONS = "builtin:questions"
BUILTIN_MODELS = ("builtin:minilm", "builtin:mpnet", "builtin:smollm2")
SMOOTHED_SCORES = "label smoothing needs classes, but the labels of this task are scores"
SMOOTHED_LABELS = "label smoothing needs one class a row, and task.type is multilabel"
WEIGHTED_SCORES = "class weights need classes, but the labels of this task are scores"
_POLYNOMIAL_END = 1e-7  # the learning rate at which transformers' polynomial schedule ends

Finding = tuple[KeyPath, str, str | None]  # key, what is wrong, what to do


def recipe_problems(
    recipe: Recipe, places: Mapping[KeyPath, Place], *, data: bool = True
) -> list[Problem]:
    """Return every problem of a recipe that its schema does not see.

    Args:
        recipe: A recipe that fits the schema.
        places: Where its keys were written.
        data: Whether the data files and the adapter of ``init_from`` must exist.
    """
    found = [
        *_task(recipe),
        *(_data_files(recipe) if data else ()),
        *_model(recipe, places),
        *_basis(recipe),
        *(_adapter_folder(recipe) if data else ()),
        *_output_dir(recipe),
        *_quantization(recipe),
        *_init_from(recipe),
        *_best_model(recipe),
        *_trackers(recipe),
        *_scheduler(recipe),
        *_label_smoothing(recipe),
        *_sampled_loss(recipe),
        *_sample_prompts(recipe, data=data),
        *_class_weights(recipe),
    ]
    return [
        find_place(places, path).problem(dotted(path), clip(what), fix) for path, what, fix in found
    ]


def _task(recipe: Recipe) -> Iterator[Finding]:
    task, names = recipe.task, known_task_names()
    if task.name not in names:
        yield ("task", "name"), f"unknown task {task.name!r}", suggest(task.name, names)
    elif task.name in FILE_TASKS and not task.train_paths:
        fix = f"give task.path: the {task.name} file, or a folder with train and validation files"
        yield ("task", "path"), f"is missing for task {task.name}", fix
    elif task.name == "chat" and not task.train_paths and not (task.chat and task.chat.hub):
        fix = "give task.path (a file or folder) or task.chat.hub (owner/name)"
        yield ("task", "path"), "is missing for task chat", fix
    try:
        check_settings(task)
    except UsageError as error:
        yield tuple((error.where or "task").split(".")), error.what, error.fix


def _data_files(recipe: Recipe) -> Iterator[Finding]:
    task = recipe.task
    if task.path is not None and not exists(task.path):
        yield ("task", "path"), f"no such file or folder: {from_here(task.path)}", None
    for source in task.mix or ():
        if not exists(source.path):
            yield ("task", "mix"), f"no such file or folder: {from_here(source.path)}", None
    for name, file in (task.evaluation or {}).items():
        if not is_file(file):
            yield ("task", "evaluation", name), f"no such file: {from_here(file)}", None
    forgetting = task.chat.forgetting if task.chat else None
    if forgetting is not None and not is_file(forgetting):
        yield ("task", "chat", "forgetting"), f"no such file: {from_here(forgetting)}", None


def _sample_prompts(recipe: Recipe, *, data: bool) -> Iterator[Finding]:
    """Find prompts for a model that does not answer, or a file that does not exist."""
    prompts, key = recipe.train.sample_prompts, ("train", "sample_prompts")
    if prompts is None:
        return
    if recipe.task.name not in CHAT_TASKS:
        what = f"needs a model that answers, and {recipe.task.name} trains a classifier"
        fix = f"leave it out; tasks with answers are {', '.join(CHAT_TASKS)}"
        yield key, what, fix
    elif isinstance(prompts, str) and prompts.startswith("builtin:"):
        if prompts != BUILTIN_QUESTIONS:
            yield key, f"unknown built-in questions {prompts!r}", BUILTIN_QUESTIONS
    elif isinstance(prompts, str) and data and not is_file(prompts):
        fix = "name a file, or give the prompts as a list: ['Why is the sky blue?']"
        yield key, f"no such file: {from_here(prompts)}", fix


def _model(recipe: Recipe, places: Mapping[KeyPath, Place]) -> Iterator[Finding]:
    """Find an unknown built-in model, or a folder that does not exist."""
    name, path = recipe.model.name, ("model", "name")
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            yield path, f"unknown built-in model {name!r}", suggest(name, BUILTIN_MODELS)
        return
    if is_folder(name):
        return
    near = near_folder(name, expanded(find_place(places, path).file).parent)
    if looks_like_folder(name):
        fix = near or "a hub id has at most one slash and no leading dot"
        yield path, f"no such folder: {from_here(name)}", fix
    elif "/" in name and near and recipe.model.revision is None:
        fix = f"{near} For a model of that name on the hub, set model.revision: main"
        yield path, f"no such folder: {name}", fix


def _basis(recipe: Recipe) -> Iterator[Finding]:
    basis = recipe.calibration.basis
    if basis is not None and not is_file(basis):
        fix = "write one with `sparsegrad calibrate`"
        yield ("calibration", "basis"), f"no such file: {from_here(basis)}", fix


def _output_dir(recipe: Recipe) -> Iterator[Finding]:
    folder = recipe.output_dir
    if folder is not None and str(expanded(folder)).startswith("~"):
        yield ("output_dir",), f"there is no such home: {folder}", "write the folder in full"


def _init_from(recipe: Recipe) -> Iterator[Finding]:
    """Find settings that do not fit a start from the adapter of another run."""
    method = recipe.method
    if recipe.init_from is None:
        return
    if not method.beside_weights:
        what = f"{method.name} trains the weights themselves, not an adapter beside them"
        fix = "`sparsegrad export RUN --to merged`, and set model to the export"
        yield ("init_from",), what, fix
    elif method.calibrates and recipe.calibration.basis is not None:
        yield ("calibration", "basis"), "the basis comes with init_from", "leave it out"
    if method.calibrates and recipe.calibration.keep_head:
        what = "has no effect with init_from, which brings its head and needs no warm-up"
        yield ("calibration", "keep_head"), what, "leave it out"


def _adapter_folder(recipe: Recipe) -> Iterator[Finding]:
    """Find an ``init_from`` that names no adapter, or one trained with other settings."""
    if recipe.init_from is None:
        return
    folder = expanded(recipe.init_from)
    if folder.name == "adapter" and is_file(folder.parent / "run.json"):
        folder = folder.parent
    if not (is_file(folder / "run.json") or is_file(folder / "adapter_config.json")):
        what = f"expected a folder with run.json or adapter_config.json: {recipe.init_from}"
        yield ("init_from",), what, "name a run's folder or a PEFT LoRA folder"
        return
    difference = _difference(recipe, folder) if recipe.method.beside_weights else None
    if difference is not None:
        fix = "set the same in this recipe; or export it with `--to merged` and set model to it"
        yield ("init_from",), f"{from_here(recipe.init_from)} {difference}", fix


def _difference(recipe: Recipe, folder: Path) -> str | None:
    """Return how an adapter was trained differently, as far as the JSON files in its folder tell.

    What only its tensors or the model tell is compared when training loads them.
    """
    method = recipe.method
    now: dict[str, object] = {"method.name": method.name, "scope": recipe.scope}
    then: dict[str, object] = {}
    try:
        if is_file(folder / "run.json"):
            trained = plain_json((folder / "run.json").read_bytes())["method"]
            then = {"method.name": trained["name"], "scope": trained["scope"]}
            settings = trained["settings"] if trained["name"] == method.name else {}
        else:
            config = plain_json((folder / "adapter_config.json").read_bytes())
            if config["peft_type"] != method.peft_type:
                kind = f"{config['peft_type']:.60}"
                return f"is a PEFT adapter of type {kind}, but the method is {method.name}"
            settings = method.from_peft(config)
        for key, value in method.model_dump(exclude={"name", *method.training_only}).items():
            # A setting that one of the two leaves open is compared when the tensors are loaded.
            if value is not None and settings.get(key) is not None:
                now[f"method.{key}"], then[f"method.{key}"] = value, settings[key]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # A damaged or unfinished folder is reported when its tensors are read.
    differing = [key for key in then if then[key] != now[key]]
    if not differing:
        return None
    listed = "; ".join(f"{key} is {now[key]} here, and was {then[key]}" for key in differing)
    return f"was trained with other settings: {listed}"


def _quantization(recipe: Recipe) -> Iterator[Finding]:
    """Find settings that a quantized model rules out."""
    bits, method = recipe.model.quantization, recipe.method
    if bits is None:
        return
    frozen = f"model.quantization {bits!r} freezes them"
    plain = "or leave model.quantization out"
    refusal = method.quantization_refusal()
    if refusal is not None:
        key, what = refusal
        fix = f"use sparsegrad (form core) or lora, {plain}"
        yield ("method", key), f"{what}, and {frozen}", fix
    calibration = recipe.calibration
    if method.calibrates and calibration.source == "batch" and calibration.basis is None:
        what = f"source batch needs gradients of weights, which {bits} weights do not have"
        fix = "use source: token"
        if calibration.decomposition == "sequential":
            fix += " with decomposition: randomized"
        yield ("calibration", "source"), what, fix
    if recipe.scope == "rest":
        what = f"scope rest trains the weights between the target modules, and {frozen}"
        yield ("scope",), what, f"use scope head, {plain}"
    if recipe.train.torch_compile:
        what = "torch_compile cannot train the layers of bitsandbytes"
        yield ("train", "torch_compile"), what, f"leave it out, {plain}"


def _best_model(recipe: Recipe) -> Iterator[Finding]:
    """Require a checkpoint at every evaluation if the run ends with its best model.

    transformers also accepts several evaluations for each checkpoint. It then ends with a model
    that is not the best one.
    """
    train = recipe.train
    evaluated, saved = train.eval_strategy, train.save_strategy or train.eval_strategy
    if not train.load_best_model_at_end or "no" in (evaluated, saved) or saved == "best":
        return
    fix = (
        "save_strategy: best saves every best model; with load_best_model_at_end: false the run "
        "ends with its last model"
    )
    lost = "saves no checkpoint at some evaluations"
    steps = train.save_steps or train.eval_steps
    if saved != evaluated:
        what = f"{saved!r} {lost} (eval_strategy is {evaluated!r}), so the best model may be lost"
        yield ("train", "save_strategy"), what, fix
    elif saved == "steps" and steps != train.eval_steps:
        what = f"{steps} {lost} (eval_steps is {train.eval_steps}), so the best model may be lost"
        yield ("train", "save_steps"), what, fix


def _trackers(recipe: Recipe) -> Iterator[Finding]:
    """Find names that transformers would refuse only after model and data are loaded."""
    report_to, key = recipe.train.report_to, ("train", "report_to")
    names = (report_to,) if isinstance(report_to, str) else report_to
    for name in names:
        if name in ("none", "all") and len(names) > 1:
            what = f"{name!r} cannot be combined with other trackers"
            yield key, what, "name only the trackers"
        elif name not in ("none", "all", *TRACKERS):
            yield key, f"unknown tracker {name!r}", suggest(name, (*TRACKERS, "none", "all"))


def _scheduler(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if train.lr_scheduler_type == "polynomial" and train.learning_rate <= _POLYNOMIAL_END:
        what = f"expected more than {_POLYNOMIAL_END:g}, where lr_scheduler_type polynomial ends"
        yield ("train", "learning_rate"), what, "raise it, or use lr_scheduler_type: linear"


def _label_smoothing(recipe: Recipe) -> Iterator[Finding]:
    task, key = recipe.task, ("train", "label_smoothing_factor")
    if not recipe.train.label_smoothing_factor:
        return
    if task.name in CHAT_TASKS:
        what = f"label smoothing needs all logits, which are never computed for {task.name}"
        yield key, what, "leave it out"
    elif task.type == "multilabel":
        yield key, SMOOTHED_LABELS, "leave it out"
    elif _has_scores(task):
        yield key, SMOOTHED_SCORES, "leave it out"


def _sampled_loss(recipe: Recipe) -> Iterator[Finding]:
    """Find a loss over a sample of the vocabulary where there is none, or where it cannot run."""
    loss, key = recipe.train.loss, ("train", "loss")
    if loss == "full":
        return
    if recipe.task.name not in CHAT_TASKS:
        what = f"{loss} samples a vocabulary, and {recipe.task.name} trains a classifier"
        fix = f"leave it out; tasks with a vocabulary are {', '.join(CHAT_TASKS)}"
        yield key, what, fix
    elif recipe.train.torch_compile:
        what = f"{loss} draws other classes in every step, which torch_compile cannot follow"
        yield key, what, "use loss: full, or leave torch_compile out"


def _class_weights(recipe: Recipe) -> Iterator[Finding]:
    task, key = recipe.task, ("train", "class_weights")
    if recipe.train.class_weights is None:
        return
    if task.name in CHAT_TASKS:
        yield key, f"class weights need classes, and {task.name} has none", "leave it out"
    elif _has_scores(task):
        yield key, WEIGHTED_SCORES, "leave it out"


def _has_scores(task: TaskSection) -> bool:
    """Return whether a task is known to be a regression before its data is read."""
    glue = GLUE_TASKS.get(task.name.removeprefix("glue/"))
    by_name = glue is not None and glue.regression
    return by_name or task.type == "regression" or task.metric in SCORE_METRICS
