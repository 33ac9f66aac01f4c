"""Keep a base model's trained head if it has the task's classes; else initialize a new one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.tasks import TaskSpec
from sparsegrad_cli.records import run as records

_GENERIC = re.compile(r"LABEL_(\d+)")  # The names that transformers gives to unnamed classes.
_SHOWN = 4  # Labels in a note.


@dataclass(frozen=True)
class HeadMatch:
    """Whether the output layer in a base model's files has the task's classes.

    Attributes:
        order: The stored class number of each class of the task; None if the classes differ.
        reason: Why the layer is kept or not, for the note.
    """

    order: tuple[int, ...] | None
    reason: str

    @property
    def moved(self) -> bool:
        """Whether the stored classes have another order than the task's."""
        return self.order is not None and self.order != tuple(range(len(self.order)))


@dataclass(frozen=True)
class HeadStart:
    """Where the parameters of a classifier's head come from.

    Attributes:
        start: Start of the output layer: ``kept``, ``aligned`` (kept, with its classes in the
            task's order) or ``fresh`` (initialized at random).
        kept: Names of the head's parameters that were read from the base model's files.
        fresh: Names of the model's parameters that its files lack; they were initialized at random.
        note: A sentence for the user if the files held an output layer, else None.
    """

    start: records.Start
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    note: str | None

    def record(self) -> records.HeadStart:
        """Return the record of it in run.json."""
        return records.HeadStart(start=self.start, kept=list(self.kept), fresh=list(self.fresh))


def match_labels(config: Any, spec: TaskSpec) -> HeadMatch:
    """Compare a base model's labels with a task's, by name.

    Names are compared exactly, and then without case and with ``_``, ``-`` and spaces treated as
    equal. ``LABEL_3`` matches only a class that the data call ``3``.

    Args:
        config: The base model's configuration, as in its files.
        spec: The task.
    """
    stored = _stored_names(config)
    kind = getattr(config, "problem_type", None)
    if spec.regression:
        if len(stored) == 1 and kind in (None, "regression"):
            return HeadMatch((0,), "it gives one score, as this regression asks for")
        return HeadMatch(None, f"it is of {_listed(stored)}, and the task is a regression")
    names = list(spec.label_names or ())
    if len(stored) == 1:
        return HeadMatch(None, f"it gives one score, the data {_count(names)}")
    if len(stored) != len(names):
        return HeadMatch(
            None, f"it has {_count(stored)} ({_listed(stored)}), the data {_count(names)}"
        )
    for form in (str, _number, _loose):
        places = {form(name): place for place, name in enumerate(stored)}
        wanted = [form(name) for name in names]
        if len(places) == len(stored) and set(places) == set(wanted):
            order = tuple(places[name] for name in wanted)
            return HeadMatch(order, f"its classes have the data's names: {_listed(names)}")
    if any(_GENERIC.fullmatch(name) for name in stored):
        reason = f"{_listed(stored)} do not say which of them is which of {_listed(names)}"
        return HeadMatch(None, f"{reason}; name them in its config.json (id2label) to keep it")
    return HeadMatch(None, f"its classes are {_listed(stored)}, the data's {_listed(names)}")


def _stored_names(config: Any) -> list[str]:
    """Return the label names by class; generic ones if ``id2label`` contradicts ``label2id``."""
    by_class: Mapping[int, str] = getattr(config, "id2label", None) or {}
    names = [str(by_class.get(number, "")) for number in range(len(by_class))]
    by_name: Mapping[str, int] = getattr(config, "label2id", None) or {}
    other = {number: str(name) for name, number in by_name.items()}
    others = [other.get(number, "") for number in range(len(names))]
    if names == others or not all(others) or all(map(_GENERIC.fullmatch, others)):
        return names
    return [f"LABEL_{number}" for number in range(len(names))]


def _number(name: str) -> str:
    found = _GENERIC.fullmatch(name)
    return found[1] if found else name


def _loose(name: str) -> str:
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", _number(name).strip().casefold())


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} class{'' if len(names) == 1 else 'es'}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def class_dimensions(model: nn.Module, other: nn.Module) -> dict[str, int]:
    """Return the dimension of the classes for each parameter of the head's output layer.

    Args:
        model: A classifier.
        other: The same model for another number of classes.
    """
    shapes = {name: p.shape for name, p in head_parameters(other).items()}
    return {
        name: next(d for d, size in enumerate(p.shape) if size != shapes[name][d])
        for name, p in head_parameters(model).items()
        if p.shape != shapes[name]
    }


def reorder_output_layer(
    model: nn.Module, dimensions: Mapping[str, int], order: Sequence[int]
) -> None:
    """Reorder the classes of an output layer, in place.

    Args:
        model: A classifier.
        dimensions: The result of :func:`class_dimensions`.
        order: The old class number of each new class.
    """
    with torch.no_grad():
        for name, dimension in dimensions.items():
            parameter = model.get_parameter(name)
            index = torch.tensor(order, device=parameter.device)
            parameter.copy_(parameter.index_select(dimension, index))


def copy_output_layer(model: nn.Module, dimensions: Mapping[str, int], other: nn.Module) -> None:
    """Copy the output layer of another model, in place.

    Args:
        model: The classifier to copy into.
        dimensions: The result of :func:`class_dimensions`.
        other: The same model with at least as many classes.
    """
    with torch.no_grad():
        for name, dimension in dimensions.items():
            parameter = model.get_parameter(name)
            wider = other.get_parameter(name)
            parameter.copy_(wider.narrow(dimension, 0, parameter.shape[dimension]))


def describe_head_start(
    model: nn.Module, outputs: Sequence[str], lacking: Sequence[str], match: HeadMatch, held: bool
) -> HeadStart:
    """Describe where the parameters of a loaded classifier's head come from.

    Args:
        model: The classifier.
        outputs: Names of the output layer's parameters.
        lacking: Names of the parameters that were not read from the model's files.
        match: Whether the stored classes are the task's.
        held: Whether the files hold an output layer, for any classes.
    """
    kept = tuple(name for name in head_parameters(model) if name not in lacking)
    fresh = tuple(sorted(lacking))
    if not held:
        return HeadStart("fresh", kept, fresh, None)
    if not set(outputs) & set(fresh):
        moved = "; they were put in the data's order" if match.moved else ""
        note = f"the base model's trained head is kept: {match.reason}{moved}"
        return HeadStart("aligned" if match.moved else "kept", kept, fresh, note)
    reason = match.reason
    if match.order is not None:
        reason = "its shape in the files is not the one that config.json describes"
    note = f"the output layer of the base model's head is drawn afresh: {reason}"
    others = f"; kept of the head: {_listed(kept)}" if kept else ""
    return HeadStart("fresh", kept, fresh, note + others)
