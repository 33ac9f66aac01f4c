"""Settings of the methods that train a change of W. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.recipe.section import Density, PositiveInt, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe

DEFAULT_RANK = 8


class ChangeSettings(MethodSettings):
    """Settings of a method that trains a change of W, whose size a rank says.

    Subclasses declare ``name`` and :attr:`implementation_class`, and say :meth:`count`.
    """

    rank: PositiveInt | None = Field(None, description="8 unless density solves it")
    density: Density | None = Field(
        None, description="with match: trainable, rank is solved from this"
    )

    solves_rank: ClassVar[bool] = True
    sized_by: ClassVar[frozenset[str]] = frozenset({"rank", "density"})
    rivals: ClassVar[tuple[str, ...]] = ("density", "rank")
    # The density only says how the rank was found.
    training_only: ClassVar[frozenset[str]] = frozenset({"recompute", "density"})
    implementation_class: ClassVar[str]
    """``module:Class`` in this folder."""

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters that train in a layer (out, in) at a rank; grows with the rank."""
        raise NotImplementedError

    def highest_rank(self, out_features: int, in_features: int) -> int:
        """Return the rank above which a layer (out, in) gains nothing."""
        return min(out_features, in_features)

    # --- how recipes and studies treat the settings

    def check(self, recipe: Recipe) -> None:
        """Check that rank, density and ``match`` fix the rank once."""
        rank, density, fix = "method.rank", "method.density", "give method.rank alone"
        if self.rank is not None and self.density is not None:
            what = f"and method.density both say how large {self.name} is: give one of the two"
            fix = "method.rank alone, or method.density with match: trainable"
            raise SettingError(what, rank, density, "match", fix=fix)
        if recipe.match and self.rank is not None:
            what = "is what match: trainable solves from method.density: give one of the two"
            fix = "leave out match, or give method.density in place of method.rank"
            raise SettingError(what, rank, "match", fix=fix)
        if recipe.match and self.density is None:
            what = f"trainable solves the rank of {self.name} from method.density: give it"
            raise SettingError(what, "match", density, fix="method.density: 0.01")
        if self.density is not None and not recipe.match:
            what = f"of {self.name} has an effect only with match: trainable, which solves its rank"
            fix = "match: trainable, or method.rank in place of method.density"
            raise SettingError(what, density, "match", fix=fix)

    @property
    def learning_rate_center(self) -> float:
        """That of LoRA."""
        return 2e-3

    @property
    def beside_weights(self) -> bool:
        """True: a change beside W trains."""
        return True

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return the setting that the number of parameters follows from."""
        return [f"a smaller method.{'rank' if self.density is None else 'density'}"]

    # --- how large it is

    def total(self, targets: Sequence[Target], rank: int) -> int:
        """Return the parameters that train in all targets at a rank."""
        return sum(self.count(t.out_features, t.in_features, rank) for t in targets)

    def requested(self, targets: Sequence[Target]) -> int | None:
        """Return what density asks for over all targets; None without a density."""
        if self.density is None:
            return None
        shapes = ((t.out_features, t.in_features) for t in targets)
        return sum(count_for_density(self.density, *shape) for shape in shapes)

    def rank_on(self, targets: Sequence[Target]) -> int:
        """Return the rank, or that whose parameters come nearest to what density asks for."""
        requested = self.requested(targets)
        if requested is None:
            return self.rank or DEFAULT_RANK
        ranks = range(1, self._highest(targets) + 1)
        at = bisect_left(ranks, requested, key=lambda rank: self.total(targets, rank))
        near = [rank for rank in (at, at + 1) if rank in ranks]  # the last below, the first above
        return min(near, key=lambda rank: abs(self.total(targets, rank) - requested))

    def _highest(self, targets: Sequence[Target]) -> int:
        return max(self.highest_rank(t.out_features, t.in_features) for t in targets)

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters at the rank."""
        rank = self.rank_on(shapes.targets)
        return Sizing(self.total(shapes.targets, rank), f"rank {rank}")

    def size_range(self, shapes: TargetShapes) -> SizeRange | None:
        """Return the ranks up to the highest of any layer."""
        limit = "a higher rank adds nothing to any layer"
        return SizeRange(1, self._highest(shapes.targets), limit)

    def with_size(self, size: int) -> Self:
        """Return the settings at a rank."""
        return self.model_copy(update={"rank": size, "density": None})

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"sparsegrad_cli.methods.neighbours.{self.implementation_class}"


def count_note(settings: ChangeSettings, targets: Sequence[Target], rank: int) -> str:
    """Return the rank, and that it is the highest where density asks for more."""
    requested = settings.requested(targets)
    if requested is None or settings.total(targets, rank) >= requested:
        return f"rank {rank}"
    at_limit = settings.total(targets, rank + 1) == settings.total(targets, rank)
    return f"rank {rank}, the highest there is" if at_limit else f"rank {rank}"


class FloraSettings(ChangeSettings):
    """FLoRA (Si et al. 2024): B G A with a trained core G."""

    name: Literal["flora"]
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor of B G A")

    implementation_class: ClassVar[str] = "flora:Flora"

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters of B, G and A."""
        return rank * (out_features + in_features) + rank * rank


CHANGES: dict[str, type[MethodSettings]] = {
    "flora": FloraSettings,
}
