"""What no training can do, known from the recipe alone. Imports no torch."""

from __future__ import annotations

from sparsegrad_cli.data.spec import CHAT_TASKS, GLUE_TASKS, SCORE_METRICS
from sparsegrad_cli.recipe.schema import Recipe, TrainSection
from sparsegrad_cli.recipe.source import KeyPath

SMOOTHED_SCORES = "label smoothing is one of classes, and the labels of this task are scores"


def training_problems(recipe: Recipe) -> list[tuple[KeyPath, str, str]]:
    """(key, what is wrong, what to do), all of them."""
    found = _of_the_best(recipe.train)
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
