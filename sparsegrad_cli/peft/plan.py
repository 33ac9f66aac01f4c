"""What trains in each target module: the rank of its core, and the parameters of its support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.supports import (
    allocate,
    comparable_scores,
    largest_entries,
    spectral_scores,
)


@dataclass(frozen=True)
class CorePlan:
    """The core of one target module.

    Attributes:
        basis: Q_out (out, r_out) and Q_in (in, r_in).
        count: Number of parameters of S that one step changes.
        positions: (count,) flat positions in S, ascending: the support of a static core, or the
            first one of a core that is refreshed. None where all of S trains, or where the
            optimizer chooses in every step.
    """

    basis: Basis
    count: int
    positions: Tensor | None = None


@dataclass(frozen=True)
class PlannedCores:
    """Cores that were planned before, in the place of a basis in :class:`SparseGradConfig`.

    Attributes:
        plans: Module name -> core.
        scores: Empty, because the supports are chosen.
    """

    plans: Mapping[str, CorePlan]
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def by_target(self) -> dict[str, Basis]:
        """Return module name -> basis."""
        return {name: plan.basis for name, plan in self.plans.items()}


def plan_cores(
    bases: Mapping[str, Basis],
    scores: Mapping[str, Tensor],
    requested: Mapping[str, int],
    *,
    support: str,
    allocation: str,
) -> dict[str, CorePlan]:
    """Return the cores of all target modules.

    Args:
        bases: Module name -> basis, cut to the core's rank; modules may share one.
        scores: Module name -> scores of the core's parameters, at least as many per side as the
            core has; the singular values serve as scores of modules without them.
        requested: Module name -> number of parameters, at most the size of the core counts.
        support: As in :class:`SparseGradConfig`.
        allocation: ``target`` chooses ``requested`` in every module, ``model`` as many in all
            modules together.
    """
    rooms = {name: b.q_out.shape[1] * b.q_in.shape[1] for name, b in bases.items()}
    if support == "dense":
        return {name: CorePlan(basis, rooms[name]) for name, basis in bases.items()}
    counts = {name: min(requested[name], room) for name, room in rooms.items()}
    if support == "dynamic":
        return {name: CorePlan(basis, counts[name]) for name, basis in bases.items()}
    chosen = _supports(bases, scores, counts, allocation)
    return {name: CorePlan(b, len(chosen[name]), chosen[name]) for name, b in bases.items()}


def _supports(
    bases: Mapping[str, Basis],
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    allocation: str,
) -> dict[str, Tensor]:
    # Always chosen on the CPU: among equal scores a GPU takes others, and a resumed run, which
    # reads the scores from a file, must choose as before.
    worth = {name: _fitting_score(b, scores.get(name)).cpu() for name, b in bases.items()}
    if allocation == "model":
        sharing = Counter(id(basis) for basis in bases.values())
        for name in worth.keys() - scores.keys():
            weight, number = bases[name].token_weight, sharing[id(bases[name])]
            worth[name] = comparable_scores(worth[name], weight, number)
        chosen = allocate(list(worth.values()), sum(counts.values()))
        return dict(zip(worth, chosen, strict=True))
    return {name: largest_entries(score, counts[name]) for name, score in worth.items()}


def _fitting_score(basis: Basis, score: Tensor | None) -> Tensor:
    """Return (r_out, r_in) scores of calibration, cut to the core, or of the singular values."""
    if score is None:
        return spectral_scores(basis)
    return score[: basis.q_out.shape[1], : basis.q_in.shape[1]]
