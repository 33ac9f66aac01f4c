"""What a core will be before there is one: its rank within a budget, and its support."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.sparse_sizing import asked_entries
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.supports import (
    allocate,
    comparable_scores,
    largest_entries,
    spectral_scores,
)
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.recipe.section import parse_bytes

# A support fills this share of the core, so that there is something to choose from.
FILL = 1 / 3


def with_rank(
    settings: SparsegradMethod, targets: list[Target], keys: Mapping[str, str], where: str
) -> SparsegradMethod:
    """Settings of a core whose rank is a number or a share: what was left open or given in bytes.

    Args:
        keys: target name -> key of its basis.
        where: the place to blame.

    Raises:
        UsageError: not even rank 1 fits the bytes; says what it takes.
    """
    if settings.form != "core" or isinstance(settings.rank, int | float):
        return settings
    if settings.rank is None:
        rank = rank_for_density(settings, targets)
    else:
        rank = rank_in_budget(parse_bytes(settings.rank), targets, keys)
        if rank == 0:
            raise UsageError(
                f"method.rank: bases and cores of rank 1 take more than {settings.rank}",
                where=where,
                fix="allow more, or calibration.basis_per: kind, which shares bases",
            )
    return settings.model_copy(update={"rank": rank})


def with_known_rank(
    settings: SparsegradMethod, targets: list[Target], keys: Mapping[str, str], where: str
) -> SparsegradMethod:
    """:func:`with_rank` before anything was calibrated: the rank is a number.

    Raises:
        UsageError: it is a share of energy; or as :func:`with_rank`.
    """
    if isinstance(settings.rank, float):
        raise UsageError(
            f"method.rank {settings.rank:g} is a share of energy: which rank that is, only "
            "calibration on real data can say",
            where=where,
            fix="give a number of directions, or the bytes they may take",
        )
    return with_rank(settings, targets, keys, where)


def rank_for_density(settings: SparsegradMethod, targets: list[Target]) -> int:
    """The smallest multiple of 8 whose core the density fills to a third (dense: wholly)."""
    most = max(asked_entries(settings, targets).values())
    side = math.sqrt(most / (1 if settings.support == "dense" else FILL))
    widest = max(max(t.out_features, t.in_features) for t in targets)
    return min(widest, 8 * math.ceil(side / 8))


def rank_in_budget(budget: int, targets: list[Target], keys: Mapping[str, str]) -> int:
    """The largest rank whose bases and cores take at most ``budget`` bytes; 0 if none does.

    Bases are counted once per key and four numbers per entry of a core (value, gradient, two
    moments), all in float32: what stays in memory whatever the batch is.
    """
    sides = {keys[t.name]: (t.out_features, t.in_features) for t in targets}

    def taken(rank: int) -> int:
        bases = sum(min(rank, side) * side for pair in sides.values() for side in pair)
        cores = sum(min(rank, t.out_features) * min(rank, t.in_features) for t in targets)
        return 4 * (bases + 4 * cores)

    widest = max(side for pair in sides.values() for side in pair)
    return bisect_right(range(1, widest + 1), budget, key=taken)  # taken() grows with the rank


def planned_supports(
    settings: SparsegradMethod,
    targets: list[Target],
    bases: Mapping[str, Basis],
    scores: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Flat positions in each target's core that calibration chooses; none if training will.

    Args:
        bases: target name -> basis of the core's rank.
        scores: target name -> scores of the core's entries; without, the spectra choose.
    """
    if settings.support not in ("static", "refresh"):
        return {}
    # Chosen on the CPU, whatever trains: of equal scores a GPU takes others, and a resumed run,
    # which has them from a file, must choose as the first one did.
    worth = {t.name: _fitting_score(bases[t.name], scores.get(t.name)).cpu() for t in targets}
    wanted = asked_entries(settings, targets)
    asked = {t.name: min(wanted[t.name], worth[t.name].numel()) for t in targets}
    if settings.allocation == "model":
        sharing = Counter(id(bases[name]) for name in worth)
        for name in worth.keys() - scores.keys():
            tokens, number = bases[name].tokens, sharing[id(bases[name])]
            worth[name] = comparable_scores(worth[name], tokens, number)
        chosen = allocate(list(worth.values()), sum(asked.values()))
        return dict(zip(worth, chosen, strict=True))
    return {name: largest_entries(score, asked[name]) for name, score in worth.items()}


def _fitting_score(basis: Basis, score: Tensor | None) -> Tensor:
    """(r_out, r_in) scores: calibration's, cut to the core's directions, or the spectra's."""
    if score is None:
        return spectral_scores(basis)
    return score[: basis.q_out.shape[1], : basis.q_in.shape[1]]
