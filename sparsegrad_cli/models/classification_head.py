"""The trained head that a base model brings: kept for the same classes, drawn afresh for others."""

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

_GENERIC = re.compile(r"LABEL_(\d+)")  # transformers' names for classes that nobody has named
_SHOWN = 4  # labels in a note


@dataclass(frozen=True)
class HeadMatch:
    """Whether the output layer in a base model's files is of the task's classes.

    Attributes:
        order: the stored class of each class of the task; None if the layer is not of them.
        reason: why it is kept or not, for the note.
    """

    order: tuple[int, ...] | None
    reason: str

    @property
    def moved(self) -> bool:
        """Whether the stored classes stand in another order than the task's."""
        return self.order is not None and self.order != tuple(range(len(self.order)))


@dataclass(frozen=True)
class HeadStart:
    """Where the parameters of a classifier's head come from, read off its loading.

    Attributes:
        start: ``kept``, ``aligned`` (kept, its classes put in the task's order) or ``fresh``: of
            the output layer.
        kept: parameters of the head that the base model's files gave.
        fresh: parameters of the model that its files lack, which were drawn at random.
        note: for the user, where the files held an output layer.
    """

    start: records.Start
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    note: str | None

    def record(self) -> records.HeadStart:
        """Return the start as run.json keeps it."""
        return records.HeadStart(start=self.start, kept=list(self.kept), fresh=list(self.fresh))


def match_labels(config: Any, spec: TaskSpec) -> HeadMatch:
    """Compare a base model's labels with a task's, by name.

    Names are compared as they are, then without case and with ``_``, ``-`` and spaces taken as
    equal. ``LABEL_3`` is the class that the data call ``3``, and nothing else.

    Args:
        config: of the base model, as its files have it.
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
    """Label names by class; generic ones where ``id2label`` and ``label2id`` contradict another."""
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
    """Parameters of the head's output layer -> the dimension that counts classes.

    Args:
        other: the same model for another number of classes.
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
    """Put the classes of an output layer into another order.

    Args:
        dimensions: as :func:`class_dimensions` gives them.
        order: the present class of each class to be.
    """
    with torch.no_grad():
        for name, dimension in dimensions.items():
            parameter = model.get_parameter(name)
            index = torch.tensor(order, device=parameter.device)
            parameter.copy_(parameter.index_select(dimension, index))


def copy_output_layer(model: nn.Module, dimensions: Mapping[str, int], other: nn.Module) -> None:
    """Copy the output layer of a model that has as many classes or more.

    Args:
        dimensions: as :func:`class_dimensions` gives them.
    """
    with torch.no_grad():
        for name, dimension in dimensions.items():
            parameter = model.get_parameter(name)
            wider = other.get_parameter(name)
            parameter.copy_(wider.narrow(dimension, 0, parameter.shape[dimension]))


def describe_head_start(
    model: nn.Module, outputs: Sequence[str], lacking: Sequence[str], match: HeadMatch, held: bool
) -> HeadStart:
    """What became of a base model's head.

    Args:
        outputs: parameters of the output layer.
        lacking: parameters of the model that its files did not give.
        held: whether the files hold an output layer, of whatever classes.
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
