"""Settings of the methods whose change of W is adapted during training. Imports no torch.

SoRA removes ranks, LoRA-GGPO adds noise, SNELL and SaRA choose entries, DiffoRA chooses modules.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.methods.neighbours.change_settings import ChangeSettings
from sparsegrad_cli.methods.sparse_settings import ALL_TRAIN, SparseSettings, count_text

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class FactorSettings(ChangeSettings):
    """Settings of a change s B A with s = alpha / rank, as LoRA has it."""

    alpha: Positive | None = Field(None, description="2 x rank by default")

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters of B and A."""
        return rank * (out_features + in_features)


class SoraSettings(FactorSettings):
    """SoRA (Ding et al. 2023): B diag(g) A whose gate g a soft threshold drives to zero."""

    name: Literal["sora"]
    threshold: NotNegative = Field(
        3e-4, description="soft threshold on the gate after each step, as the authors set it"
    )

    implementation_class: ClassVar[str] = "sora:Sora"
    training_only: ClassVar[frozenset[str]] = FactorSettings.training_only | {"threshold"}

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters of B, g and A."""
        return super().count(out_features, in_features, rank) + rank


class GgpoSettings(FactorSettings):
    """LoRA-GGPO (Chang et al. 2025): LoRA under noise on the whole weight in training."""

    name: Literal["lora_ggpo"]
    sigma: NotNegative = Field(0.03, description="strength of the noise")
    beta: NotNegative = Field(0.01, description="weight of the gradient's norm in the noise")

    implementation_class: ClassVar[str] = "ggpo:Ggpo"
    training_only: ClassVar[frozenset[str]] = FactorSettings.training_only | {"sigma", "beta"}

    def optimizer_refusal(self) -> tuple[str, str]:
        """Say that AdamW's state keeps the noise."""
        return "name", f"{self.name} keeps the size of its noise in the state of its AdamW"

    def sharding_refusal(self, how: str) -> tuple[str, str]:
        """Say that the noise needs whole matrices."""
        return "name", f"{self.name} measures the rows of whole matrices, and {how} splits them"


class SnellSettings(ChangeSettings):
    """SNELL (Shen et al. 2024): low-rank matrices through a kernel, whose entries compete."""

    name: Literal["snell"]
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="share of the change's entries that are zero"
    )

    implementation_class: ClassVar[str] = "snell:Snell"

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters of B and A, and the factors of the kernel's two pieces."""
        return rank * (out_features + in_features) + 2

    @property
    def starts_changed(self) -> str:
        """Say where the change comes from."""
        return "the kernel of random rows is not zero at the start"


class SaraSettings(SparseSettings):
    """SaRA (Hu et al. 2024): the smallest weights train, with a penalty on their rank."""

    name: Literal["sara"]
    rank_weight: NotNegative = Field(
        5e-3, description="weight of the nuclear norm of the chosen weights; 0 computes none"
    )
    reselect: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="share of the steps after which only weights that are still small train; "
        "1 for never",
    )

    training_only: ClassVar[frozenset[str]] = SparseSettings.training_only | {
        "rank_weight",
        "reselect",
    }

    @property
    def beside_weights(self) -> bool:
        """True: the change of the chosen weights trains."""
        return True

    def optimizer_refusal(self) -> tuple[str, str]:
        """Say that AdamW steps chosen weights."""
        return "name", f"{self.name} steps the weights that it chooses by an AdamW of its own"

    def sharding_refusal(self, how: str) -> tuple[str, str]:
        """Say that the penalty needs whole matrices."""
        return (
            "name",
            f"{self.name} needs the singular vectors of whole matrices; {how} splits them",
        )

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the weights that train."""
        count = sum(self.requested(shapes.targets).values())
        return Sizing(count, count_text(count, shapes.parameters))

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return numbers of weights."""
        return SizeRange(len(shapes.targets), shapes.parameters, ALL_TRAIN, fine=True)

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return "sparsegrad_cli.methods.neighbours.sara:Sara"


class DifforaSettings(FactorSettings):
    """DiffoRA (Jiang et al. 2025): gates choose the modules in which LoRA trains."""

    name: Literal["diffora"]
    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the target modules that keep their adapters"
    )
    search: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the steps in which gates and adapters train in turn"
    )

    implementation_class: ClassVar[str] = "diffora:Diffora"
    training_only: ClassVar[frozenset[str]] = FactorSettings.training_only | {"keep", "search"}

    def count(self, out_features: int, in_features: int, rank: int) -> int:
        """Return the parameters of B and A, and the gate: all modules train at first."""
        return super().count(out_features, in_features, rank) + 1

    def kept(self, targets: int) -> int:
        """Return how many of the targets keep their adapters."""
        return max(1, round(self.keep * targets))

    def optimizer_refusal(self) -> tuple[str, str]:
        """Say that AdamW's moments follow the gates."""
        return "name", f"{self.name} rescales the moments of its AdamW when it chooses modules"

    def sharding_refusal(self, how: str) -> tuple[str, str]:
        """Say that the choice needs whole parameters."""
        return "name", f"{self.name} compares the gates of all modules, and {how} splits them"


ADAPTIVE: dict[str, type[MethodSettings]] = {
    "sora": SoraSettings,
    "lora_ggpo": GgpoSettings,
    "snell": SnellSettings,
    "sara": SaraSettings,
    "diffora": DifforaSettings,
}
