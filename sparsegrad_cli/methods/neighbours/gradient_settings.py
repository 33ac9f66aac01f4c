"""Settings of methods whose optimizer sees a gradient in part or in few dimensions. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.methods.lora.settings import AlphaSettings, LowRankSettings, ScaledSettings
from sparsegrad_cli.recipe.section import Density, PositiveInt, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe

_PARTS = "sparsegrad_cli.methods.neighbours"
_SHARES = 1000  # steps of FRUGAL's share that a budget may choose from
EQUAL_MEMORY = "match: optimizer_state=SIZE or peak=SIZE in a study"


class ProjectedSettings(MethodSettings):
    """Settings that all methods share which train all of W with little optimizer state."""

    update_every: PositiveInt = Field(
        200, description="optimizer steps between two choices of what the optimizer keeps state for"
    )

    training_only: ClassVar[frozenset[str]] = frozenset({"recompute", "update_every"})

    def check(self, recipe: Recipe) -> None:
        """Refuse ``match``: no size of these methods changes the number of trained parameters."""
        if recipe.match is not None:
            what = f"cannot size {self.name}, which trains every parameter of the target modules"
            raise SettingError(what, "match", "method.name", fix=EQUAL_MEMORY)

    @property
    def learning_rate_center(self) -> float:
        """The center of full fine-tuning; no rate of these methods has been tuned yet."""
        return 2e-4

    def optimizer_refusal(self) -> tuple[str, str] | None:
        """Say that the method is an optimizer."""
        return "name", f"{self.name} is an optimizer itself"

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Say that matrices must be whole."""
        return "name", f"{self.name} projects whole gradient matrices, and {how} splits them"


class SubspaceSettings(ProjectedSettings):
    """Settings of methods that run Adam in a subspace of a gradient's shorter side."""

    rank: PositiveInt = Field(8, description="dimensions of the subspace")
    scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor of every step of the target modules' weights (alpha)"
    )

    sized_by: ClassVar[frozenset[str]] = frozenset({"rank"})
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"recompute", "update_every", "rank", "scale"}
    )

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return all parameters of the targets, and the rank."""
        return Sizing(shapes.parameters, f"all parameters, gradients of rank {self.rank}")

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return ranks up to the narrow side of the widest layer."""
        narrow = max(min(t.out_features, t.in_features) for t in shapes.targets)
        limit = "a higher rank than the layers' narrow side adds nothing"
        return SizeRange(1, narrow, limit, trains_all=True)

    def with_size(self, size: int) -> Self:
        """Return the settings at a rank."""
        return self.model_copy(update={"rank": size})


class GaloreSettings(SubspaceSettings):
    """GaLore (Zhao et al. 2024): Adam on the gradient in its leading singular directions."""

    name: Literal["galore"]

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.galore:Galore"


class FiraSettings(SubspaceSettings):
    """Fira (Chen et al. 2024): GaLore, and a scaled step on the rest of the gradient."""

    name: Literal["fira"]
    growth_limit: Annotated[float, Field(gt=1)] = Field(
        1.01, description="largest growth of the norm of the step outside of the subspace (gamma)"
    )

    training_only: ClassVar[frozenset[str]] = SubspaceSettings.training_only | {"growth_limit"}

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.fira:Fira"


class DctAdamwSettings(SubspaceSettings):
    """DCT-AdamW (Modoranu et al. 2025): Adam on chosen columns of the cosine transform."""

    name: Literal["dct_adamw"]

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.dct_adamw:DctAdamw"


class FrugalSettings(ProjectedSettings):
    """FRUGAL (Zmushko et al. 2024): Adam on a random share of columns, sign descent elsewhere."""

    name: Literal["frugal"]
    share: Density = Field(0.25, description="share of W's columns that Adam steps (rho)")
    free_scale: Annotated[float, Field(ge=0)] = Field(
        0.1, description="learning rate of sign descent on the other columns, as a multiple"
    )

    sized_by: ClassVar[frozenset[str]] = frozenset({"share"})
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"recompute", "update_every", "share", "free_scale"}
    )

    def columns_of(self, target: Target) -> int:
        """Return the number of a target's columns that have optimizer state."""
        return max(1, round(self.share * target.in_features))

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return all parameters of the targets, and the share of columns with state."""
        text = f"all parameters, Adam on {100 * self.share:.3g} % of the columns"
        return Sizing(shapes.parameters, text)

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return shares in thousandths."""
        return SizeRange(1, _SHARES, "Adam steps every column", fine=True, trains_all=True)

    def with_size(self, size: int) -> Self:
        """Return the settings at a share of columns in thousandths."""
        return self.model_copy(update={"share": size / _SHARES})

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.frugal:Frugal"


class GradnormlorpSettings(AlphaSettings):
    """GradNormLoRP (Huang et al. 2024): DoRA's weight, with GaLore on the gradients of A and B."""

    name: Literal["gradnormlorp"]
    projection_rank: PositiveInt | None = Field(
        None, description="dimensions of the projected gradients; half of the rank by default"
    )
    update_every: PositiveInt = Field(
        200, description="optimizer steps between two choices of the projections"
    )
    scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor of every step of A and B (GaLore's alpha)"
    )

    training_only: ClassVar[frozenset[str]] = AlphaSettings.training_only | {
        "projection_rank",
        "update_every",
        "scale",
    }

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters of A and B, and one magnitude per output."""
        plain = super().sizing(shapes)
        magnitudes = sum(t.out_features for t in shapes.targets)
        return Sizing(plain.trainable + magnitudes, plain.text)

    def lora_options(self, rank: int) -> dict[str, Any]:
        """Return alpha, dropout and DoRA."""
        return {**super().lora_options(rank), "use_dora": True}

    def optimizer_refusal(self) -> tuple[str, str] | None:
        """Say that the optimizer is a part of the method."""
        return "name", f"{self.name} projects the gradients of A and B for AdamW"

    def quantization_refusal(self) -> tuple[str, str] | None:
        """Say that it reads the weights."""
        return "name", f"{self.name} normalizes the rows of the weights in every step"

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Say that matrices must be whole."""
        return "name", f"{self.name} projects whole gradient matrices, and {how} splits them"

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.gradnormlorp:Gradnormlorp"


class LoraProSettings(ScaledSettings):
    """LoRA-Pro (Wang et al. 2024): LoRA with gradients corrected towards that of W."""

    name: Literal["lora_pro"]

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Say that A and B must be whole."""
        return (
            "name",
            f"{self.name} corrects the gradients of whole matrices, and {how} splits them",
        )

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.lora_pro:LoraPro"


class AlloraSettings(LowRankSettings):
    """ALLoRA (Huang & Balestriero 2024): LoRA without alpha and dropout; B steps row by row."""

    name: Literal["allora"]
    eta_squared: Annotated[float, Field(gt=0)] = Field(
        2.0, description="square of the factor of a row's step at the start; the paper tries 1 to 4"
    )

    training_only: ClassVar[frozenset[str]] = LowRankSettings.training_only | {"eta_squared"}

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Say that A and B must be whole."""
        return "name", f"{self.name} measures the rows of whole matrices, and {how} splits them"

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"{_PARTS}.allora:Allora"


GRADIENTS: dict[str, type[MethodSettings]] = {
    "galore": GaloreSettings,
    "fira": FiraSettings,
    "frugal": FrugalSettings,
    "dct_adamw": DctAdamwSettings,
    "gradnormlorp": GradnormlorpSettings,
    "lora_pro": LoraProSettings,
    "allora": AlloraSettings,
}
