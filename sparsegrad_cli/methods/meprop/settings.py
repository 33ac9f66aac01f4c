"""Settings of MeProp. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from sparsegrad_cli.methods.base import SizeRange, Sizing, TargetShapes
from sparsegrad_cli.methods.sparse_settings import ALL_TRAIN, SparseSettings, count_text
from sparsegrad_cli.recipe.section import SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe


class MepropSettings(SparseSettings):
    """MeProp: ``entries`` keeps the largest |dL/dW|; ``rows`` (Sun et al. 2017) of |dL/dy|."""

    name: Literal["meprop"]
    select: Literal["entries", "rows"] = Field(
        "entries", description="the largest entries of dL/dW, or the largest rows of dL/dy"
    )
    state_capacity: Annotated[float, Field(ge=1)] | None = Field(
        None, description="entries: as for method sparsegrad"
    )
    unified: bool = Field(
        False, description="rows: one choice for the whole batch instead of one per example"
    )

    @property
    def learning_rate_center(self) -> float:
        """Geometric mean, to one digit, of the rates that tuning chose.

        sst2 2e-3 and 1e-3, cola 5e-4, OpenAssistant with SmolLM2-135M 2e-3.
        """
        return 1e-3

    def check(self, recipe: Recipe) -> None:
        """Check which settings go with which selection."""
        if self.state_capacity is not None and self.select != "entries":
            keys = ("method.state_capacity", "method.select")
            raise SettingError("goes with method.select: entries", *keys)
        if self.unified and self.select != "rows":
            raise SettingError("goes with method.select: rows", "method.unified", "method.select")
        if self.unified and recipe.train.gradient_accumulation_steps > 1:
            raise SettingError(
                "chooses rows in each backward pass, before gradients have accumulated",
                "method.unified",
                "train.gradient_accumulation_steps",
                fix="train.gradient_accumulation_steps: 1, or method.unified: false",
            )

    @property
    def splits_batches(self) -> bool:
        """False where the rows are chosen for a whole batch."""
        return not self.unified

    def optimizer_refusal(self) -> tuple[str, str]:
        """Say that AdamW chooses the parameters."""
        return "name", "meprop steps the parameters that it chooses by an AdamW of its own"

    def sharding_refusal(self, how: str) -> tuple[str, str]:
        """Say that matrices must be whole."""
        return (
            "name",
            f"{self.name} chooses among all entries of a matrix, and {how} splits matrices",
        )

    def rows(self, targets: Sequence[Target]) -> Mapping[str, int]:
        """Return target name -> outputs through which ``rows`` back-propagates."""
        if self.density is not None:
            return {t.name: max(1, round(self.density * t.out_features)) for t in targets}
        requested = self.requested(targets)
        return {t.name: max(1, round(requested[t.name] / t.in_features)) for t in targets}

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the chosen parameters; with ``rows``, those of one example."""
        if self.select == "rows":
            rows = self.rows(shapes.targets)
            count = sum(rows[t.name] * t.in_features for t in shapes.targets)
        else:
            count = sum(self.requested(shapes.targets).values())
        return Sizing(count, count_text(count, shapes.parameters))

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return numbers of parameters. Only bounded optimizer state grows with them."""
        return SizeRange(
            len(shapes.targets),
            shapes.parameters,
            ALL_TRAIN,
            fine=True,
            costs_memory=self.state_capacity is not None,
            advice="bound it by method.state_capacity",
        )

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return "sparsegrad_cli.methods.meprop.method:Meprop"
