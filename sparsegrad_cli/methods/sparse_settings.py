"""Settings that MeProp and SparseGrad share: how many parameters are chosen. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.numerics.sizing import count_for_density, split_by_size
from sparsegrad_cli.recipe.section import Density, PositiveInt, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target

ALL_TRAIN = "every parameter of the targets trains"


class SparseSettings(MethodSettings):
    """Settings of a method that chooses parameters: how many, by density or by number."""

    density: Density | None = Field(
        0.01, description="share of the parameters of the target modules that train in a step"
    )
    entries: PositiveInt | None = Field(
        None,
        description="instead of density: number of parameters of all targets, divided by size",
    )

    chooses_by_density: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _entries_or_density(cls, data: Any) -> Any:
        """Drop the default of density where ``entries`` is given."""
        if isinstance(data, dict) and data.get("entries") is not None:
            return {"density": None, **data}
        return data

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.density is None) == (self.entries is None):
            what = "density or entries says how many parameters train: give one of the two"
            raise SettingError(what, "density", "entries")
        return self

    def requested(self, targets: Sequence[Target]) -> Mapping[str, int]:
        """Return target name -> number of parameters that density or ``entries`` asks for.

        Raises:
            UsageError: the targets do not have so many, or there are more targets than parameters
                to train.
        """
        if self.entries is None:
            assert self.density is not None  # the recipe was checked
            shapes = ((t.out_features, t.in_features) for t in targets)
            counts = [count_for_density(self.density, *shape) for shape in shapes]
        else:
            try:
                counts = split_by_size(self.entries, [t.size for t in targets])
            except ValueError:
                raise UsageError(
                    f"method.entries is {self.entries:,}: the {len(targets)} targets have "
                    f"{sum(t.size for t in targets):,}, and each needs at least one",
                    where="method.entries",
                ) from None
        return {target.name: count for target, count in zip(targets, counts, strict=True)}

    def with_size(self, size: int) -> Self:
        """Return the settings with this number of parameters over all targets."""
        return self.model_copy(update={"entries": size, "density": None})


def count_text(count: int, of: int) -> str:
    """Return such as ``70,776 parameters (1.00 %)``."""
    return f"{count:,} parameters ({100 * count / of:.3g} %)"
