"""Settings of LoRA. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from sparsegrad_cli.methods.sized_settings import SizedSettings


class LowRankSettings(SizedSettings):
    """Settings of every method with LoRA's factors A and B."""

    @property
    def trains_lora_factors(self) -> bool:
        """True."""
        return True

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the parameters of A and B at a rank."""
        return size * (out_features + in_features)

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
