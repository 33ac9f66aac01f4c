"""Settings of LoRA. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.recipe.section import Density, PositiveInt, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe

DEFAULT_RANK = 8


class LowRankSettings(MethodSettings):
    """Settings of every method with LoRA's factors A and B: the rank, or what solves it."""

    rank: PositiveInt | None = Field(None, description="8 unless density solves it")
    density: Density | None = Field(
        None, description="with match: trainable, rank is solved from this"
    )

    solves_rank: ClassVar[bool] = True
    sized_by: ClassVar[frozenset[str]] = frozenset({"rank", "density"})
    rivals: ClassVar[tuple[str, ...]] = ("density", "rank")
    # The density only says how the rank was found.
    training_only: ClassVar[frozenset[str]] = frozenset({"recompute", "density"})

    @property
    def learning_rate_center(self) -> float:
        """Geometric mean, to one digit, of the rates that tuning chose for LoRA.

        sst2 2e-3 twice, cola 5e-4, OpenAssistant with SmolLM2-135M 4e-3.
        """
        return 2e-3

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
    def beside_weights(self) -> bool:
        """True: A and B train."""
        return True

    @property
    def trains_lora_factors(self) -> bool:
        """True."""
        return True

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return the setting that the size of A and B follows from."""
        return [f"a smaller method.{'rank' if self.density is None else 'density'}"]

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters of A and B; a rank-r adapter has r (out + in) of them."""
        rank = self.rank_on(shapes.targets)
        per_rank = sum(t.out_features + t.in_features for t in shapes.targets)
        return Sizing(rank * per_rank, f"rank {rank}")

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return ranks up to the narrow side of the widest layer."""
        narrow = max(min(t.out_features, t.in_features) for t in shapes.targets)
        limit = "a higher rank than the layers' narrow side adds nothing"
        return SizeRange(1, narrow, limit)

    def with_size(self, size: int) -> Self:
        """Return the settings at a rank."""
        return self.model_copy(update={"rank": size, "density": None})

    def rank_on(self, targets: Sequence[Target]) -> int:
        """Return the rank, solved from the density where there is one."""
        if self.density is None:
            return self.rank or DEFAULT_RANK
        return solve_rank(targets, self.density)[0]

    def settle_from_adapter(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return the settings with the rank of the adapter's A."""
        rank = next((shape[0] for name, shape in shapes.items() if "lora_A" in name), self.rank)
        return self.model_copy(update={"rank": rank})

    def lora_options(self, rank: int) -> dict[str, Any]:
        """Return further arguments of peft's ``LoraConfig``: a scale of 1 by default."""
        return {"lora_alpha": rank}


class AlphaSettings(LowRankSettings):
    """Settings of a method whose B A is scaled by alpha / r, as in LoRA."""

    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="2 x rank by default")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout of the input of A, in training"
    )

    training_only: ClassVar[frozenset[str]] = LowRankSettings.training_only | {"dropout"}

    def settle_from_adapter(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return the settings with the rank of the adapter's A, and alpha."""
        settled = super().settle_from_adapter(shapes)
        alpha = settled.alpha
        if alpha is None and settled.rank is not None:
            alpha = 2 * settled.rank
        return settled.model_copy(update={"alpha": alpha})

    def lora_options(self, rank: int) -> dict[str, Any]:
        """Return alpha and dropout."""
        return {"lora_alpha": self.alpha or 2 * rank, "lora_dropout": self.dropout}


class ScaledSettings(AlphaSettings):
    """The same, with rsLoRA's scale alpha / sqrt(r) as a choice (Kalajdzievski 2023)."""

    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023): for high ranks"
    )

    def lora_options(self, rank: int) -> dict[str, Any]:
        """Return alpha, dropout and rsLoRA."""
        return {**super().lora_options(rank), "use_rslora": self.rslora}


class LoraSettings(ScaledSettings):
    """LoRA (Hu et al. 2021) by the peft library."""

    name: Literal["lora"]

    peft_type: ClassVar[str | None] = "LORA"

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return rank, alpha and rsLoRA. This method has no patterns and no DoRA."""
        unused: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "use_dora": False}
        return {
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "rslora": bool(config.get("use_rslora")),
            **{key: config.get(key) or value for key, value in unused.items()},
        }

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return "sparsegrad_cli.methods.lora.method:Lora"


def solve_rank(targets: Sequence[Target], density: float) -> tuple[int, int]:
    """Return the rank whose parameters over all targets come nearest to what density asks for.

    A rank-r adapter of an (out, in) layer has r (out + in) parameters.

    Returns:
        (rank, requested parameters over all targets). The rank is at least 1.
    """
    requested = sum(count_for_density(density, t.out_features, t.in_features) for t in targets)
    per_rank = sum(t.out_features + t.in_features for t in targets)
    return max(1, round(requested / per_rank)), requested
