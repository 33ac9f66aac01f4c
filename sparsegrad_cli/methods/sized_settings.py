"""Settings of methods that train something beside W whose size a rank or another key says.

Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.recipe.section import Density, PositiveInt, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe

DEFAULT_RANK = 8


class SizedSettings(MethodSettings):
    """Settings of a method beside frozen weights whose size one key says, such as a rank.

    Subclasses say :meth:`count`. Where another key than ``rank`` says the size, they name it in
    :attr:`size_key`.
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
    size_key: ClassVar[str] = "rank"
    """The key that ``match: trainable`` solves from ``density``."""
    default_size: ClassVar[int] = DEFAULT_RANK
    """The value of that key where nothing says it."""

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the parameters that train in a layer (out, in) at a size; grows with the size."""
        raise NotImplementedError

    def largest_size(self, out_features: int, in_features: int) -> int:
        """Return the size above which a layer (out, in) gains nothing."""
        return min(out_features, in_features)

    # --- how recipes and studies treat the settings

    def check(self, recipe: Recipe) -> None:
        """Check that size, density and ``match`` fix the size once."""
        word, given = self.size_key, self.size is not None
        size, density = f"method.{word}", "method.density"
        if given and self.density is not None:
            what = f"and method.density both say how large {self.name} is: give one of the two"
            fix = f"{size} alone, or method.density with match: trainable"
            raise SettingError(what, size, density, "match", fix=fix)
        if recipe.match and given:
            what = "is what match: trainable solves from method.density: give one of the two"
            fix = f"leave out match, or give method.density in place of {size}"
            raise SettingError(what, size, "match", fix=fix)
        if recipe.match and self.density is None:
            what = f"trainable solves the {word} of {self.name} from method.density: give it"
            raise SettingError(what, "match", density, fix="method.density: 0.01")
        if self.density is not None and not recipe.match:
            what = (
                f"of {self.name} has an effect only with match: trainable, which solves its {word}"
            )
            fix = f"match: trainable, or {size} in place of method.density"
            raise SettingError(what, density, "match", fix=fix)

    @property
    def learning_rate_center(self) -> float:
        """Geometric mean, to one digit, of the rates that tuning chose for LoRA.

        sst2 2e-3 twice, cola 5e-4, OpenAssistant with SmolLM2-135M 4e-3.
        """
        return 2e-3

    @property
    def beside_weights(self) -> bool:
        """True."""
        return True

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return the setting that the number of parameters follows from."""
        return [f"a smaller method.{self.size_key if self.density is None else 'density'}"]

    # --- how large it is

    @property
    def size(self) -> int | None:
        """The value of :attr:`size_key`; None where a default or the density says it."""
        found: int | None = getattr(self, self.size_key)
        return found

    def total(self, targets: Sequence[Target], size: int) -> int:
        """Return the parameters that train in all targets at a size."""
        return sum(self.count(t.out_features, t.in_features, size) for t in targets)

    def requested(self, targets: Sequence[Target]) -> int | None:
        """Return what density asks for over all targets; None without a density."""
        if self.density is None:
            return None
        shapes = ((t.out_features, t.in_features) for t in targets)
        return sum(count_for_density(self.density, *shape) for shape in shapes)

    def size_on(self, targets: Sequence[Target]) -> int:
        """Return the size, or that whose parameters come nearest to what density asks for."""
        requested = self.requested(targets)
        if requested is None:
            return self.size or min(self.default_size, self._largest(targets))
        sizes = range(1, self._largest(targets) + 1)
        at = bisect_left(sizes, requested, key=lambda size: self.total(targets, size))
        near = [size for size in (at, at + 1) if size in sizes]  # the last below, the first above
        return min(near, key=lambda size: abs(self.total(targets, size) - requested))

    def _largest(self, targets: Sequence[Target]) -> int:
        return max(self.largest_size(t.out_features, t.in_features) for t in targets)

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters at the size."""
        size = self.size_on(shapes.targets)
        return Sizing(self.total(shapes.targets, size), f"{self.size_key} {size}")

    def size_range(self, shapes: TargetShapes) -> SizeRange | None:
        """Return the sizes up to the largest of any layer."""
        limit = f"a larger {self.size_key} adds nothing to any layer"
        return SizeRange(1, self._largest(shapes.targets), limit)

    def with_size(self, size: int) -> Self:
        """Return the settings at a size."""
        return self.model_copy(update={self.size_key: size, "density": None})

    def note(self, targets: Sequence[Target]) -> str:
        """Return the size for the record, and whether more is asked for than there is."""
        size, most, requested = (
            self.size_on(targets),
            self._largest(targets),
            self.requested(targets),
        )
        text = f"{self.size_key} {size}"
        if size > most and self.total(targets, size) == self.total(targets, most):
            return f"{text}, of which no layer has more than {most}"
        short = requested is not None and self.total(targets, size) < requested
        return f"{text}, the largest there is" if short and size == most else text
