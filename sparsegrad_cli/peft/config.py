"""The configuration of the tuner, as ``adapter_config.json`` stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from peft import PeftConfig, PeftType
from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.peft.config_checks import problems

NAME = "SPARSEGRAD"
"""PEFT's name for the tuner."""
DENSITY = 0.01
"""Density of a configuration that gives none."""


class CalibratedBases(Protocol):
    """What :func:`sparsegrad_cli.calibrate` returns, as far as the tuner uses it.

    Attributes:
        scores: Module name -> (r_out, r_in) scores of the core's parameters; may be empty.
    """

    @property
    def scores(self) -> Mapping[str, Tensor]: ...

    def by_target(self) -> Mapping[str, Basis]:
        """Return module name -> basis; modules that share a basis share the object."""
        ...


@dataclass
class SparseGradConfig(PeftConfig):
    """Configuration of SparseGrad's core form: W stays frozen, S in W + Q_out S Q_in' trains.

    Chekalina et al. 2024 (arXiv 2410.07383), section 3. A new adapter needs ``basis``; a loaded
    adapter takes bases and supports from its file.

    Args:
        basis: The bases of :func:`sparsegrad_cli.calibrate`. They are saved with the adapter's
            weights and not in this configuration.
        target_modules: Names, suffixes of names or a regular expression, as in PEFT; by default all
            modules that the basis was computed for.
        exclude_modules: Modules to leave out, in the same form.
        modules_to_save: Further modules to train and save, such as a classifier.
        density: Share of the parameters of each target module that trains; 0.01 by default. A
            core that is too small for it trains whole, with a warning. With ``support="dense"``,
            it only chooses the rank, so give one of the two.
        rank: Directions per side of the core; by default the multiple of 8 at which the
            density fills a third of the core (all of it with ``support="dense"``). A side with
            fewer features has all its directions.
        support: Which parameters of S train. ``static``: chosen once; ``dense``: all;
            ``dynamic``: the largest gradients of each step; ``refresh``: chosen again every
            ``refresh_steps`` steps. The last two need :func:`sparsegrad_cli.peft.optimizer`.
        allocation: ``static``: whether the density holds per ``target`` or over the whole
            ``model``.
        refresh_steps: Optimizer steps between two choices of ``refresh``.
        state_capacity: ``dynamic``: largest number of parameters with optimizer state, in
            multiples of those of one step; None keeps state for all of S.
        layers: Module name -> [r_out, r_in, trained parameters]; filled in by the tuner. A loaded
            adapter has these sizes, whatever ``density`` and ``rank`` say.
        shared_bases: Module name -> module under whose name the file holds its bases; filled in by
            the tuner.

    Raises:
        ValueError: An argument is of another type or out of range, or has no effect with this
            support, or saved sizes contradict each other.
    """

    basis: CalibratedBases | None = field(default=None, repr=False, compare=False)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    density: float | None = None
    rank: int | None = None
    support: Literal["static", "dense", "dynamic", "refresh"] = "static"
    allocation: Literal["target", "model"] = "target"
    refresh_steps: int | None = None
    state_capacity: float | None = None
    layers: dict[str, list[int]] = field(default_factory=dict)
    shared_bases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        for problem in problems(self):
            raise ValueError(f"SparseGradConfig: {problem}")
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.density is None and (self.support != "dense" or self.rank is None):
            self.density = DENSITY

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration without ``basis``, which the weights' file holds."""
        basis, self.basis = self.basis, None
        try:
            saved: dict[str, Any] = super().to_dict()
        finally:
            self.basis = basis
        del saved["basis"]
        return saved

    @property
    def chosen_by_optimizer(self) -> bool:
        """Whether the optimizer chooses the parameters that a step changes."""
        return self.support in ("dynamic", "refresh")
