"""What no training can do, known from the recipe alone. Imports no torch."""

from __future__ import annotations

from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.schema import Recipe, TrainSection
from sparsegrad_cli.recipe.tasks import CHAT_TASKS, GLUE_TASKS, SCORE_METRICS
from sparsegrad_cli.recipe.trackers import TRACKERS
from sparsegrad_cli.recipe.yaml_source import KeyPath

_POLYNOMIAL_END = 1e-7  # the rate at which transformers' polynomial schedule ends
SMOOTHED_SCORES = "label smoothing is one of classes, and the labels of this task are scores"


def training_problems(recipe: Recipe) -> list[tuple[KeyPath, str, str]]:
    """(key, what is wrong, what to do), all of them."""
    found = [*_of_the_start(recipe), *_of_the_best(recipe.train), *_of_the_trackers(recipe.train)]
    train = recipe.train
    if train.lr_scheduler_type == "polynomial" and train.learning_rate <= _POLYNOMIAL_END:
        what = f"lr_scheduler_type polynomial ends at {_POLYNOMIAL_END:g}, which must be smaller"
        found.append((("train", "learning_rate"), what, "raise it, or use linear"))
    task = recipe.task.name
    spec = GLUE_TASKS.get(task.removeprefix("glue/"))
    if recipe.train.label_smoothing_factor:
        key = ("train", "label_smoothing_factor")
        if task in CHAT_TASKS:
            what = f"label smoothing needs all logits, which {task} never makes"
            found.append((key, what, "leave it out"))
        elif (
            recipe.task.type == "regression"
            or recipe.task.metric in SCORE_METRICS
            or (spec is not None and spec.regression)
        ):
            found.append((key, SMOOTHED_SCORES, "leave it out"))
    return found


def _of_the_start(recipe: Recipe) -> list[tuple[KeyPath, str, str]]:
    """What ``init_from`` cannot be, or what has no effect beside it."""
    found: list[tuple[KeyPath, str, str]] = []
    if recipe.init_from is None:
        return found
    if not recipe.method.beside_weights:
        what = f"{recipe.method.name} trains the weights themselves, not an adapter beside them"
        fix = "`sparsegrad export RUN --to merged`, and set model to the export"
        found.append((("init_from",), what, fix))
    elif recipe.method.calibrates and recipe.calibration.basis is not None:
        what = "the basis comes with init_from"
        found.append((("calibration", "basis"), what, "leave it out"))
    if recipe.method.calibrates and recipe.calibration.keep_head:
        what = "has no effect with init_from, which brings its head and needs no warm-up"
        found.append((("calibration", "keep_head"), what, "leave it out"))
    return found


def _of_the_trackers(train: TrainSection) -> list[tuple[KeyPath, str, str]]:
    """Names that transformers would refuse once model and data are loaded."""
    names = (train.report_to,) if isinstance(train.report_to, str) else train.report_to
    alone = ("none", "all")
    found: list[tuple[KeyPath, str, str]] = []
    for name in names:
        if name in alone and len(names) > 1:
            what = f"{name!r} does not go with other trackers"
            found.append((("train", "report_to"), what, "name the trackers alone"))
        elif name not in (*alone, *TRACKERS):
            fix = suggest(name, (*TRACKERS, *alone))
            found.append((("train", "report_to"), f"unknown tracker {name!r}", fix))
    return found


def _of_the_best(train: TrainSection) -> list[tuple[KeyPath, str, str]]:
    """A run that ends with its best model has one only where each evaluation leaves a checkpoint.

    transformers takes several evaluations a checkpoint, too, and then ends with another than the
    best.
    """
    evaluated, saved = train.eval_strategy, train.save_strategy or train.eval_strategy
    if not train.load_best_model_at_end or "no" in (evaluated, saved) or saved == "best":
        return []
    fix = "save_strategy: best keeps every best one; load_best_model_at_end: false ends with the "
    fix += "last"
    if saved != evaluated:
        what = f"{saved!r} does not keep what eval_strategy {evaluated!r} may find to be the best"
        return [(("train", "save_strategy"), what, fix)]
    steps = train.save_steps or train.eval_steps
    if saved == "steps" and steps != train.eval_steps:
        what = f"{steps} does not keep what evaluation every {train.eval_steps} steps may find "
        what += "to be the best"
        return [(("train", "save_steps"), what, fix)]
    return []
