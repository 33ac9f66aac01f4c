"""Find settings that another setting disables. Imports no torch.

Every key of a recipe has an effect, or it is refused with the reason. There are two cases:

- The key is in the same layer as the one that disables it, or in a stronger one: the recipe
  contradicts itself and is refused.
- The key is in a weaker layer, such as an extended recipe: the stronger key overrules it. It is
  reset to its default, so that the resolved recipe says what runs, and a note tells the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from sparsegrad_cli.errors import Problem
from sparsegrad_cli.io.paths import is_folder
from sparsegrad_cli.recipe.optimizers import OPTIMIZERS
from sparsegrad_cli.recipe.schema import (
    CalibrationSection,
    Recipe,
    TrainSection,
    calibration_of_the_method,
)
from sparsegrad_cli.recipe.section import Idle
from sparsegrad_cli.recipe.tasks import CHAT_TASKS, FILE_TASKS
from sparsegrad_cli.recipe.yaml_source import (
    COMMAND_LINE,
    KeyPath,
    Layer,
    Place,
    dotted,
    find_place,
)

_BASIS_KEYS = ("steps", "basis_per", "source", "decomposition", "power_steps", "score")
# Keys of task.chat that only some chat tasks use, and these tasks.
_TREES = ("oasst", "builtin:dialogues")
_CHAT_TASKS_OF = {
    **dict.fromkeys(("paths", "languages", "max_rank", "min_quality", "tree_states"), _TREES),
    "hub": ("oasst", "chat"),
    **dict.fromkeys(("config", "train_split", "validation_split", "kind", "column"), ("chat",)),
}
# Keys of train that only some losses use, and these losses.
_LOSSES_OF = {
    "loss_buckets": ("sce", "rece"),
    **dict.fromkeys(("loss_bucket_positions", "loss_bucket_classes", "loss_mix"), ("sce",)),
    **dict.fromkeys(("loss_neighbours", "loss_rounds"), ("rece",)),
}
_BATCH_KEYS = ("batch_size", "select")
_WARMUP_KEYS = ("warmup_steps", "warmup_learning_rate", "keep_head")


@dataclass(frozen=True)
class Found:
    """A setting that was written but has no effect.

    Attributes:
        idle: The setting, and why it has no effect.
        place: Where it was written.
        refused: Whether nothing stronger has overruled it.
    """

    idle: Idle
    place: Place
    refused: bool

    @property
    def lenient(self) -> bool:
        """Whether the key is shared by several commands and came from the command line."""
        return self.idle.common and self.place.file == COMMAND_LINE

    def problem(self) -> Problem:
        """Return the problem that refuses the setting."""
        key, what = dotted(self.idle.key), f"has no effect: {self.idle.why}"
        return self.place.problem(key, what, self.idle.fix)

    def note(self) -> str:
        """Return the note that tells the user about the setting."""
        return f"{dotted(self.idle.key)} ({self.place}) has no effect: {self.idle.why}"


def without_idle(recipe: Recipe, layer: Layer) -> tuple[Recipe, list[Found]]:
    """Reset the settings of a recipe that have no effect.

    Args:
        recipe: The checked recipe.
        layer: The stacked layers that it was made of, with the place and strength of each key.

    Returns:
        The recipe with defaults for these settings, and those of them that were written.
    """
    found: list[Found] = []
    values: dict[KeyPath, Any] = {}
    for idle in idle_settings(recipe):
        place = layer.places.get(idle.key)
        causes = [find_place(layer.places, cause).strength for cause in idle.causes]
        overruled = place is not None and place.strength < max(causes)
        if place is not None and place.settled and not overruled:
            continue  # A finished run had this setting, so it must not be refused.
        values[idle.key] = idle.neutral
        if place is None:  # It was not written: a default of the method fills it in.
            continue
        each = Found(idle, place, refused=not overruled)
        found.append(replace(each, refused=each.refused and not each.lenient))
    return _replaced(recipe, values), found


def _replaced(section: Any, values: dict[KeyPath, Any]) -> Any:
    """Return a section with new values for some keys, at any depth."""
    update: dict[str, Any] = {}
    for name in {str(path[0]) for path in values}:
        if (name,) in values:
            update[name] = values[(name,)]
            continue
        inner = getattr(section, name)
        deeper = {path[1:]: value for path, value in values.items() if path[0] == name}
        update[name] = _replaced(inner, deeper)
    return section.model_copy(update=update) if update else section


def idle_settings(recipe: Recipe) -> Iterator[Idle]:
    """Yield every setting of a recipe that has no effect, unless it has the value for that."""
    yield from _of_model(recipe)
    yield from _of_task(recipe)
    # One setting can have two reasons; only one of them is reported.
    both = (*_of_method(recipe), *_of_calibration(recipe))
    yield from {idle.key: idle for idle in both}.values()
    yield from _of_train(recipe)
    if recipe.train.unpadded and (padding := padding_anyway(recipe)):
        cause, why = padding
        key = ("train", "unpadded")
        yield Idle(key, _paths(cause), why, "leave it out", False, common=True)


def padding_anyway(recipe: Recipe) -> tuple[str, str] | None:
    """Return the key that makes a run compute padding whatever ``train.unpadded`` is, and why."""
    if recipe.task.name in CHAT_TASKS:
        return "task.name", "it is for encoders; task.chat.packing saves padding in conversations"
    if recipe.train.torch_compile:
        return (
            "train.torch_compile",
            "compiled models compute padding: their shapes must be equal",
        )
    return None


def _idle(
    section: BaseModel,
    path: tuple[str, ...],
    names: tuple[str, ...],
    cause: str,
    why: str,
    fix: str = "leave it out",
    *,
    defaults: BaseModel | None = None,
    **more: Any,
) -> Iterator[Idle]:
    """Yield the named settings whose values differ from their defaults.

    A zero turns a setting off, so it is not reported if the setting has no effect anyway.

    Args:
        section: The section at ``path`` in the recipe.
        cause: One dotted key, or several separated by spaces.
        defaults: A section with the defaults; None uses those of the fields.
    """
    for name in names:
        usual = type(section).model_fields[name].default
        neutral = getattr(defaults, name) if defaults is not None else usual
        value = getattr(section, name)
        if value != neutral and (value != 0 or neutral is None):
            yield Idle((*path, name), _paths(cause), why, fix, neutral, **more)


def _paths(keys: str) -> tuple[KeyPath, ...]:
    return tuple(tuple(key.split(".")) for key in keys.split())


def _of_model(recipe: Recipe) -> Iterator[Idle]:
    model = recipe.model
    if model.name.startswith("builtin:"):
        why = f"{model.name} comes with the package"
        names = ("revision", "trust_remote_code")
        yield from _idle(model, ("model",), names, "model.name", why)
    elif is_folder(model.name):
        why = f"{model.name} is a folder, and only the hub has revisions"
        yield from _idle(model, ("model",), ("revision",), "model.name", why)


def _of_task(recipe: Recipe) -> Iterator[Idle]:
    task, name = recipe.task, recipe.task.name
    at: tuple[str, ...] = ("task",)
    cause = "task.name"
    if name.startswith("builtin:"):
        yield from _idle(task, at, ("path",), cause, f"{name} is generated")
    if name not in (*FILE_TASKS, "chat"):
        why = f"it is for {', '.join(FILE_TASKS)} and chat, not for {name}"
        yield from _idle(task, at, ("mix",), cause, why)
    if name not in (*FILE_TASKS, *CHAT_TASKS):
        why = f"it is for {', '.join((*FILE_TASKS, *CHAT_TASKS))}, not for {name}"
        yield from _idle(task, at, ("evaluation",), cause, why)
    if task.mix is None:
        yield from _idle(task, at, ("mix_until",), "task.mix", "there is no task.mix")
    if name in CHAT_TASKS:
        why = "it holds out texts with labels, not conversations"
        yield from _idle(task, at, ("holdout", "test_unused"), cause, why)
        why = f"{name} has no such columns; task.chat selects the turns to train on"
        yield from _idle(task, at, ("columns",), cause, why)
    else:
        why = f"it is for {', '.join(CHAT_TASKS)}, not for {name}"
        yield from _idle(task, at, ("chat",), cause, why)
        if name not in FILE_TASKS:
            why = f"the columns of {name} are known; it is for {', '.join(FILE_TASKS)}"
            yield from _idle(task, at, ("columns",), cause, why)
            why = f"{name} has a validation split of its own"
            yield from _idle(task, at, ("validation_fraction",), cause, why)
    if name not in FILE_TASKS:
        why = f"only {', '.join(FILE_TASKS)} may have several labels a row, and the task is {name}"
        yield from _idle(task, at, ("label_separator",), cause, why)
    if name != "csv":
        why = f"only CSV and TSV files have a separator, and the task is {name}"
        yield from _idle(task, at, ("separator",), cause, why)
    chat = task.chat
    if chat is None or name not in CHAT_TASKS:
        return
    at = ("task", "chat")
    for setting, tasks in _CHAT_TASKS_OF.items():
        if name not in tasks:
            why = f"it applies to {' and '.join(tasks)}, not to {name}"
            yield from _idle(chat, at, (setting,), cause, why)
    of_hub = ("config", "train_split", "validation_split")
    if name == "chat" and chat.hub is None:
        yield from _idle(chat, at, of_hub, "task.path", "it applies to task.chat.hub, not to files")
    if chat.split == "source":
        why = "split 'source' uses the validation part of the data"
        yield from _idle(task, ("task",), ("validation_fraction",), "task.chat.split", why)


def _of_method(recipe: Recipe) -> Iterator[Idle]:
    method = recipe.method
    if not method.solves_rank:
        why = f"match solves a rank from a density, and the method is {method.name}"
        yield from _idle(recipe, (), ("match",), "method.name", why)
    yield from method.unused(recipe)


def _of_calibration(recipe: Recipe) -> Iterator[Idle]:
    method, settings, at = recipe.method, recipe.calibration, ("calibration",)
    everything = tuple(CalibrationSection.model_fields)
    if method.reads_batches and not method.calibrates:
        why = f"{method.name} reads batches of the training data and computes no bases"
        others = tuple(key for key in everything if key not in ("steps", "batch_size", "select"))
        yield from _idle(settings, at, others, "method.name", why, common=True)
        return
    if not method.calibrates:
        why = f"{method.name} does not calibrate"
        yield from _idle(settings, at, everything, "method.name", why, common=True)
        return
    form = method.model_dump()
    usual = CalibrationSection(**calibration_of_the_method(form, {"source": settings.source}))
    found = {idle.key: idle for idle in _of_new_basis(recipe, usual)}
    usual = CalibrationSection(**calibration_of_the_method(form, {}))
    if settings.basis is not None:
        why, fix = f"the bases come from {settings.basis}", "leave it out, or calibrate again"
        names = _BASIS_KEYS if settings.keep_head else (*_BASIS_KEYS, *_WARMUP_KEYS, *_BATCH_KEYS)
        said = _idle(
            settings, at, names, "calibration.basis", why, fix, defaults=usual, common=True
        )
        found |= {idle.key: idle for idle in said}
    yield from found.values()


def _of_new_basis(recipe: Recipe, usual: CalibrationSection) -> Iterator[Idle]:
    settings, at = recipe.calibration, ("calibration",)
    given = settings.source in ("random", "original")
    if given:
        why = f"source {settings.source!r} takes no gradients"
        names: tuple[str, ...] = ("decomposition", "power_steps")
        if settings.score == "spectral":
            names += ("steps",)
            if not (settings.warmup_steps and settings.keep_head):
                names += _BATCH_KEYS
            if settings.warmup_steps and not settings.keep_head:
                names += ("warmup_steps", "warmup_learning_rate")
        yield from _idle(settings, at, names, "calibration.source", why, defaults=usual)
    elif settings.decomposition != "randomized":
        why = f"power_steps applies to decomposition 'randomized', not {settings.decomposition!r}"
        yield from _idle(settings, at, ("power_steps",), "calibration.decomposition", why)
    if recipe.task.name in CHAT_TASKS:
        why = "a language model has no new head to warm up"
        yield from _idle(settings, at, _WARMUP_KEYS, "task.name", why, defaults=usual)
    elif settings.warmup_steps == 0:
        why = "calibration.warmup_steps is 0"
        yield from _idle(settings, at, _WARMUP_KEYS[1:], "calibration.warmup_steps", why)


def _of_train(recipe: Recipe) -> Iterator[Idle]:
    train, at = recipe.train, ("train",)
    evaluated, saved = train.eval_strategy, train.save_strategy or train.eval_strategy
    of_saving = "train.eval_strategy" if train.save_strategy is None else "train.save_strategy"
    if evaluated != "steps" and not (saved == "steps" and train.save_steps is None):
        why = f"eval_strategy is {evaluated!r}"
        fix = "eval_strategy: steps, or leave it out"
        causes = f"train.eval_strategy {of_saving}"
        yield from _idle(train, at, ("eval_steps",), causes, why, fix)
    if saved != "steps":
        why = f"{of_saving.removeprefix('train.')} is {saved!r}"
        if train.save_strategy is None:
            why += ", which saving follows by default"
        fix = "save_strategy: steps, or leave it out"
        yield from _idle(train, at, ("save_steps",), of_saving, why, fix)
    if saved == "no":
        why = "no checkpoint is saved"
        yield from _idle(train, at, ("save_total_limit",), of_saving, why)
    if "no" in (evaluated, saved) and train.load_best_model_at_end:
        key = "train.eval_strategy" if evaluated == "no" else of_saving
        why = "nothing is evaluated" if evaluated == "no" else "no checkpoint is saved"
        fix = "leave it out; the run then ends with its last model"
        name = "load_best_model_at_end"
        yield Idle((*at, name), _paths(key), why, fix, False)
    if evaluated == "no":
        why = "early stopping needs eval_strategy 'steps' or 'epoch'"
        fix = "eval_strategy: epoch, or leave it out"
        names = ("early_stopping_patience",)
        yield from _idle(train, at, names, "train.eval_strategy", why, fix)
    why = f"optim {train.optim} does not use it"
    unused = {"adam_beta1", "adam_beta2", "adam_epsilon"} - OPTIMIZERS[train.optim].reads
    yield from _idle(train, at, tuple(sorted(unused)), "train.optim", why)
    if recipe.task.name in CHAT_TASKS:
        why = "a language model has no task head of its own"
        yield from _idle(train, at, ("head_learning_rate",), "task.name", why)
    if not recipe.method.trains_lora_factors:
        why = f"{recipe.method.name} does not train the factors A and B of LoRA"
        names = ("lora_plus_ratio",)
        yield from _idle(train, at, names, "method.name", why, common=True)
    if train.sample_prompts is None:
        why = "there are no sample_prompts"
        of_samples = ("sample_max_new_tokens", "sample_temperature")
        yield from _idle(train, at, of_samples, "train.sample_prompts", why)
    yield from _of_sampled_loss(train)
    if train.max_steps > 0:
        why = f"max_steps {train.max_steps} determines how long training takes"
        fix = "leave one of the two out"
        yield from _idle(train, at, ("num_train_epochs",), "train.max_steps", why, fix)


def _of_sampled_loss(train: TrainSection) -> Iterator[Idle]:
    for name, losses in _LOSSES_OF.items():
        usual = TrainSection.model_fields[name].default
        if train.loss not in losses and getattr(train, name) != usual:
            why = f"it applies to train.loss {' and '.join(losses)}, not to {train.loss}"
            yield Idle(("train", name), _paths("train.loss"), why, "leave it out", usual)
