"""What a budget turns in a method: one whole number, its range, and the recipe that it makes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsegrad_cli.methods.lora.method import DEFAULT_RANK, solve_rank
from sparsegrad_cli.methods.sparse_sizing import asked_entries, asked_rows
from sparsegrad_cli.methods.sparsegrad.core_plan import rank_for_density, with_known_rank
from sparsegrad_cli.models.targets import Target, basis_keys
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.method_section import (
    FullMethod,
    LoraMethod,
    MepropMethod,
    SparsegradMethod,
)

_CORE_STEP = 8  # ranks that follow the entries are multiples of it


@dataclass(frozen=True)
class Knob:
    """The size of a recipe's method.

    Attributes:
        key: ``rank`` (of LoRA, of a dense core) or ``entries`` (of all targets together).
        least, most: its range.
        top: why there is no more than ``most``.
        costs_memory: whether a step with more of it needs more memory at all.
    """

    key: Literal["rank", "entries"]
    least: int
    most: int
    top: str
    costs_memory: bool = True

    def at(self, loaded: LoadedRecipe, size: int) -> LoadedRecipe:
        """The recipe with the method at that size."""
        method = loaded.recipe.method
        changes: dict[str, Any] = {self.key: size}
        if self.key == "entries" or isinstance(method, LoraMethod):
            changes["density"] = None
        recipe: dict[str, Any] = {"method": method.model_copy(update=changes)}
        if isinstance(method, LoraMethod):
            recipe["match"] = None
        return replace(loaded, recipe=loaded.recipe.model_copy(update=recipe))


def knob_of(loaded: LoadedRecipe, targets: list[Target]) -> Knob | None:
    """What a budget may turn; None for full fine-tuning, of which there is one size."""
    method = loaded.recipe.method
    if isinstance(method, LoraMethod):
        narrow = max(min(t.out_features, t.in_features) for t in targets)
        return Knob("rank", 1, narrow, "a higher rank than the layers' narrow side adds nothing")
    if isinstance(method, FullMethod):
        return None
    if isinstance(method, SparsegradMethod) and method.support == "dense":
        wide = max(max(t.out_features, t.in_features) for t in targets)
        return Knob("rank", 1, wide, "the core is as wide as the layers")
    every = sum(t.size for t in targets)
    # Where all entries have optimizer state and gradients, choosing more of them costs none.
    bounded = method.state_capacity is not None
    if isinstance(method, MepropMethod) or method.form != "core":
        return Knob("entries", len(targets), every, "every entry of the targets trains", bounded)
    knob = Knob("entries", len(targets), every, "every entry of the targets trains", True)
    if method.rank is None:
        return knob
    rank = _known_rank(method, loaded, targets)
    room = sum(min(rank, t.out_features) * min(rank, t.in_features) for t in targets)
    sizes = range(knob.least, knob.most + 1)  # shared out by the layers' size, cores fill unequally
    full = bisect_left(sizes, room, key=lambda size: entries_of(knob.at(loaded, size), targets))
    top = f"every entry of a core of rank {rank} trains"
    bounded = bounded or method.support in ("static", "refresh")
    return Knob("entries", knob.least, sizes[full], top, bounded)


def entries_of(loaded: LoadedRecipe, targets: list[Target]) -> int:
    """Entries of the targets that one step of the recipe changes, from shapes alone."""
    method = loaded.recipe.method
    if isinstance(method, FullMethod):
        return sum(t.size for t in targets)
    if isinstance(method, LoraMethod):
        rank = method.rank or DEFAULT_RANK
        if method.density is not None:
            rank, _ = solve_rank(targets, method.density)
        return rank * sum(t.out_features + t.in_features for t in targets)
    if isinstance(method, MepropMethod) and method.select == "rows":
        rows = asked_rows(method, targets)
        return sum(rows[t.name] * t.in_features for t in targets)
    asked = asked_entries(method, targets)
    if isinstance(method, MepropMethod) or method.form != "core":
        return sum(asked.values())
    rank = _known_rank(method, loaded, targets)
    rooms = {t.name: min(rank, t.out_features) * min(rank, t.in_features) for t in targets}
    if method.support == "dense":
        return sum(rooms.values())
    return sum(min(asked[name], room) for name, room in rooms.items())


def _known_rank(method: SparsegradMethod, loaded: LoadedRecipe, targets: list[Target]) -> int:
    keys = basis_keys(targets, loaded.recipe.calibration.basis_per)
    rank = with_known_rank(method, targets, keys, loaded.where("method.rank")).rank
    assert isinstance(rank, int)
    return rank


class Levels:
    """The first size of each rank of a core whose rank follows its entries, found when asked for.

    Args:
        knob, loaded, targets: of such a core.
    """

    def __init__(self, knob: Knob, loaded: LoadedRecipe, targets: list[Target]) -> None:
        def rank(size: int) -> int:
            settings = knob.at(loaded, size).recipe.method
            assert isinstance(settings, SparsegradMethod)
            return rank_for_density(settings, targets)

        self._rank, self._sizes = rank, range(knob.least, knob.most + 1)
        self._steps = range(rank(knob.least) + 1, rank(knob.most) + 1, _CORE_STEP)

    def __len__(self) -> int:
        return 1 + len(self._steps)

    def start(self, level: int) -> int:
        """The first size of a level, from 0."""
        if level == 0:
            return self._sizes[0]
        return self._sizes[bisect_left(self._sizes, self._steps[level - 1], key=self._rank)]

    def parts(self, size: int) -> bool:
        """Whether the next larger size is of a higher rank."""
        return self._rank(size + 1) > self._rank(size)


def levels_of(knob: Knob, loaded: LoadedRecipe, targets: list[Target]) -> Levels | None:
    """Where the figures of a method jump as its size grows; None where they do not."""
    method = loaded.recipe.method
    core = isinstance(method, SparsegradMethod) and method.form == "core" and method.rank is None
    return Levels(knob, loaded, targets) if core and knob.key == "entries" else None


def size_words(loaded: LoadedRecipe, targets: list[Target]) -> str:
    """``rank 12``; ``70,776 entries (1.00 %)``; ``all entries``."""
    method = loaded.recipe.method
    if isinstance(method, FullMethod):
        return "all entries"
    if isinstance(method, LoraMethod):
        per_rank = sum(t.out_features + t.in_features for t in targets)
        return f"rank {entries_of(loaded, targets) // per_rank}"
    if isinstance(method, SparsegradMethod) and method.form == "core":
        rank = f"core of rank {_known_rank(method, loaded, targets)}"
        if method.support == "dense":
            return rank
    else:
        rank = ""
    count = entries_of(loaded, targets)
    share = f"{count:,} entries ({100 * count / sum(t.size for t in targets):.3g} %)"
    return f"{share}, {rank}" if rank else share
