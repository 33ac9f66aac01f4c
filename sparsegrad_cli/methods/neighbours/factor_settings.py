"""Settings of the methods that replace W by a product of two factors. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.base import MethodSettings, Sizing, TargetShapes
from sparsegrad_cli.recipe.section import SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.recipe.schema import Recipe

_PARTS = "sparsegrad_cli.methods.neighbours"


class FactorSettings(MethodSettings):
    """Settings that the methods share which replace W by B A, so that W has fewer parameters."""

    def check(self, recipe: Recipe) -> None:
        """Refuse ``match``: the factors approximate W, and a small count would destroy it."""
        if recipe.match is not None:
            what = f"cannot size {self.name}, whose factors must be large enough to stand for W"
            fix = f"leave out match, or method.{min(self.sized_by)}"
            raise SettingError(what, "match", "method.name", fix=fix)

    @property
    def learning_rate_center(self) -> float:
        """The center of full fine-tuning, since the weights themselves train."""
        return 2e-4

    @property
    def starts_changed(self) -> str:
        """Say what has changed."""
        return "the factors of W are an approximation at the start"


class WeloreSettings(FactorSettings):
    """WeLoRe (Jaiswal et al. 2024): W becomes B A where its singular values fall fast."""

    name: Literal["welore"]
    reduction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of all singular values that falls below the common threshold"
    )
    allocation: Literal["spectrum", "uniform"] = Field(
        "spectrum",
        description="spectrum: a rank per module by a common threshold, and only modules of low "
        "rank change and train; uniform: the same share of the rank everywhere",
    )

    sized_by: ClassVar[frozenset[str]] = frozenset({"reduction"})

    def uniform_rank(self, out_features: int, in_features: int) -> int:
        """Return the rank of a layer (out, in) with ``allocation: uniform``."""
        return max(1, round((1 - self.reduction) * min(out_features, in_features)))

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters of the factors.

        Raises:
            UsageError: the ranks follow from singular values.
        """
        if self.allocation == "spectrum":
            raise UsageError(
                "welore chooses ranks by the singular values of the weights, which shapes do not "
                "say",
                where="method.allocation",
                fix="method.allocation: uniform, or a comparison without a budget",
            )
        count = sum(
            self.uniform_rank(t.out_features, t.in_features) * (t.out_features + t.in_features)
            for t in shapes.targets
        )
        return Sizing(count, f"{1 - self.reduction:.0%} of the rank")

    def settle_for_estimate(self, shapes: TargetShapes) -> tuple[Self, list[str]]:
        """Return settings whose ranks follow from the shapes."""
        if self.allocation == "uniform":
            return self, []
        note = "allocation: every module keeps the same share of its rank, and all of them train"
        return self.model_copy(update={"allocation": "uniform"}), [note]

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.welore:Welore"


class PelaSettings(FactorSettings):
    """PELA (Guo et al. 2024): W becomes B A, distilled from the model with W before training."""

    name: Literal["pela"]
    compression: Annotated[float, Field(gt=1)] = Field(
        1.5, description="parameters of W per parameter of its factors"
    )
    distill_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="learning rate of the stage before training"
    )
    feature_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the distance of features in that stage"
    )
    perturbation_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the largest deviation from W in that stage"
    )

    sized_by: ClassVar[frozenset[str]] = frozenset({"compression"})
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"recompute", "distill_learning_rate", "feature_weight", "perturbation_weight"}
    )

    @property
    def reads_batches(self) -> bool:
        """True: a step of distillation for each of ``calibration.steps`` batches."""
        return True

    def rank(self, out_features: int, in_features: int) -> int:
        """Return the rank at which the factors of a layer (out, in) are smaller by the ratio."""
        room = out_features * in_features / self.compression
        return max(1, int(room / (out_features + in_features)))

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters of the factors."""
        count = sum(
            self.rank(t.out_features, t.in_features) * (t.out_features + t.in_features)
            for t in shapes.targets
        )
        return Sizing(count, f"compressed {self.compression:g} times")

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.pela:Pela"


FACTORS: dict[str, type[MethodSettings]] = {
    "welore": WeloreSettings,
    "pela": PelaSettings,
}
