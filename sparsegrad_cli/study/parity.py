"""Check that a study compares only methods: diff the resolved recipes before the first run starts.

Between the runs of a task and seed, these may differ: the method's own section, its calibration,
``match``, ``train.lora_plus_ratio``, which only some methods have, ``train.learning_rate``, which a
study tunes for each method, other keys that it tunes (``tune.space``), and batches or steps that
its budget has set. Any other key that differs is refused, or flagged in the report if the study
names it under ``differ``. A head that is warmed up (``calibration.keep_head``) is not part of the
method: it counts like any other key.
Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.errors import Problem, RecipeError
from sparsegrad_cli.io.suggest import did_you_mean
from sparsegrad_cli.recipe.load_recipe import leaves, to_plain
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.recipe.study import LoadedStudy
from sparsegrad_cli.records.study import KeyDifference, ParityBlock

DECLARED = "train.learning_rate"  # always declared, in addition to the tuned keys
_OWN = ("method", "calibration", "match", "seed", "output_dir")
_HEAD = "calibration.keep_head"
_BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
_RATIO = "train.lora_plus_ratio"
_STEPS, _EPOCHS = "train.max_steps", "train.num_train_epochs"


@dataclass(frozen=True)
class Difference:
    """A key whose value differs between the methods of a task.

    Attributes:
        task: the task.
        key: dotted recipe key.
        values: method label to value, in the study's order.
    """

    task: str
    key: str
    values: Mapping[str, Any]

    def text(self) -> str:
        """Return ``lora 3, meprop 3, all others 0``, with the most common value once and last."""
        shown = {label: str(value) for label, value in self.values.items()}
        common, count = Counter(shown.values()).most_common(1)[0]
        odd = [f"{label} {value}" for label, value in shown.items() if value != common]
        if count == 1:
            return ", ".join(f"{label} {value}" for label, value in shown.items())
        return f"{', '.join(odd)}, all others {common}"


def differences(study: LoadedStudy) -> list[Difference]:
    """Return all keys that differ between the methods of a task, by task, then by key.

    No setting of a study depends on the seed, so comparing the runs of one seed is enough.
    """
    found = []
    for task in dict.fromkeys(cell.task for cell in study.cells):
        views = {
            cell.label: compared(cell.loaded.recipe)
            for cell in study.cells
            if (cell.task, cell.seed) == (task, study.study.seeds[0])
        }
        keys = sorted({key for view in views.values() for key in view})
        follows = _STEPS in keys and len({view.get(_STEPS) for view in views.values()}) > 1
        for key in keys:
            if key == _EPOCHS and follows:  # steps override epochs, so it would repeat them
                continue
            values = {label: view.get(key) for label, view in views.items()}
            if len({str(value) for value in values.values()}) > 1:
                found.append(Difference(task, key, values))
    return found


def compared(recipe: Recipe) -> dict[str, Any]:
    """Return the keys that must be equal, and the learning rate, as dotted key to value."""
    plain = {key: value for key, value in to_plain(recipe).items() if key not in _OWN}
    view = dict(leaves(plain))
    del view[_RATIO]
    if recipe.train.lr_scheduler_type == "constant_with_warmup":
        view["train.lr_scheduler_type"] = "constant"  # warmup_steps is compared separately
    calibration = recipe.calibration
    view[_HEAD] = "cold"
    if recipe.method.calibrates and calibration.keep_head and calibration.warmup_steps:
        view[_HEAD] = f"{calibration.warmup_steps} steps at {calibration.warmup_learning_rate:g}"
    return view


def check_parity(study: LoadedStudy) -> ParityBlock:
    """Refuse a study whose recipes differ in keys that are not the method's own.

    Returns:
        The ``parity`` block of compare.json: the number of keys compared, the declared differences
        (learning rates, tuned keys, and keys that the budget has set), and the other differences,
        which are flagged.

    Raises:
        RecipeError: the study has differences that it does not name under ``differ``, or names
            something there that is not a key. The error lists all of them.
    """
    allowed = study.study.differ
    found = differences(study)
    problems = _unknown(study, allowed)
    tuned = {DECLARED, *(study.study.tune.keys() if study.study.tune else ())}
    solved = _solved(study)
    declared = [d for d in found if d.key in tuned or (d.task, d.key) in solved]
    flagged = [d for d in found if d not in declared]
    problems += _refusals(study, [d for d in flagged if d.key not in allowed])
    if problems:
        raise RecipeError(problems)
    keys = {key for cell in study.cells for key in compared(cell.loaded.recipe)}
    return ParityBlock(
        compared=len(keys),
        declared=[_block(d, None if d.key in tuned else "budget") for d in declared],
        flagged=[_block(d) for d in flagged],
    )


def _solved(study: LoadedStudy) -> set[tuple[str, str]]:
    """Return (task, key) of the keys that the budget has set and that may therefore differ.

    Batches may differ as long as every method of the task has the same number of examples per
    update.
    """
    found: set[tuple[str, str]] = set()
    for row in study.budget.rows if study.budget is not None else []:
        found |= {(row.task, key) for key in row.set}
    for task in {task for task, _ in found}:
        trains = [cell.loaded.recipe.train for cell in study.cells if cell.task == task]
        examples = {t.per_device_train_batch_size * t.gradient_accumulation_steps for t in trains}
        if len(examples) > 1:
            found -= {(task, key) for key in _BATCH}
    return {(task, key) for task, key in found if key in _BATCH}


def _unknown(study: LoadedStudy, allowed: tuple[str, ...]) -> list[Problem]:
    keys = sorted({key for cell in study.cells for key in compared(cell.loaded.recipe)})
    problems = []
    for name in allowed:
        if name not in keys:
            fix = did_you_mean(name, keys) or "such as train.warmup_steps"
            what = f"{name!r} is not a key that can differ between methods"
            problems.append(Problem("differ", what, study.source, None, fix))
    return problems


def _refusals(study: LoadedStudy, refused: list[Difference]) -> list[Problem]:
    """Return one problem for each key and its values, even if several tasks have it."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for difference in refused:
        tasks.setdefault((difference.key, difference.text()), []).append(difference.task)
    return [
        Problem(
            key,
            f"differs between the methods of {', '.join(where)}: {text}",
            study.source,
            None,
            f"set it for all of them; or add differ: [{key}] to the study, and the report flags it",
        )
        for (key, text), where in tasks.items()
    ]


def _block(difference: Difference, why: str | None = None) -> KeyDifference:
    values = dict(difference.values)
    return KeyDifference(task=difference.task, key=difference.key, values=values, why=why)
