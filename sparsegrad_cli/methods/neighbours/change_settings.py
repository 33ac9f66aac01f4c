"""Settings of the methods that train a change of W. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.sized_settings import SizedSettings
from sparsegrad_cli.recipe.section import Density, PositiveInt


class ChangeSettings(SizedSettings):
    """Settings of a method that trains a change of W.

    Subclasses declare ``name`` and :attr:`implementation_class`, and say :meth:`count`.
    """

    implementation_class: ClassVar[str]
    """``module:Class`` in this folder."""

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return f"sparsegrad_cli.methods.neighbours.{self.implementation_class}"


class FloraSettings(ChangeSettings):
    """FLoRA (Si et al. 2024): B G A with a trained core G."""

    name: Literal["flora"]
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor of B G A")

    implementation_class: ClassVar[str] = "flora:Flora"

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the parameters of B, G and A."""
        return size * (out_features + in_features) + size * size


class BlockLoraSettings(ChangeSettings):
    """Block-LoRA (Zhou et al. 2025): (B_1 + ... + B_n) A_s."""

    name: Literal["block_lora"]
    rank: PositiveInt | None = Field(
        None, description="of the shared A_s; 8 unless density solves it"
    )
    blocks: PositiveInt = Field(2, description="number of the factors B_i that share A_s")
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="2 x rank by default; the change is multiplied by alpha / rank"
    )

    implementation_class: ClassVar[str] = "block_lora:BlockLora"

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the parameters of all B_i and of A_s."""
        return size * (self.blocks * out_features + in_features)


class NolaSettings(ChangeSettings):
    """NOLA (Koohpayegani et al. 2024): B and A are combinations of random matrices."""

    name: Literal["nola"]
    rank: PositiveInt = Field(8, description="rank of B and A, which trains no more parameters")
    matrices: PositiveInt | None = Field(
        None,
        description="number of random matrices that each of B and A is combined from; 64 unless "
        "density solves it",
    )
    density: Density | None = Field(
        None, description="with match: trainable, matrices is solved from this"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="2 x rank by default; the change is multiplied by alpha / rank"
    )

    sized_by: ClassVar[frozenset[str]] = frozenset({"matrices", "density"})
    rivals: ClassVar[tuple[str, ...]] = ("density", "matrices")
    implementation_class: ClassVar[str] = "nola:Nola"
    size_key: ClassVar[str] = "matrices"
    default_size: ClassVar[int] = 64

    @property
    def learning_rate_center(self) -> float:
        """Higher than that of LoRA: each coefficient moves a whole matrix by little."""
        return 1e-2

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the coefficients of both factors."""
        return 2 * size

    def largest_size(self, out_features: int, in_features: int) -> int:
        """Return the number of entries of the smaller factor: more matrices than that depend."""
        return self.rank * min(out_features, in_features)


class SvfitSettings(ChangeSettings):
    """SVFit (Sun et al. 2024): the largest singular values of W train."""

    name: Literal["svfit"]
    rank: PositiveInt | None = Field(
        None,
        description="number of singular values that train; 768 unless density solves it, at most "
        "all of a layer",
    )

    implementation_class: ClassVar[str] = "svfit:Svfit"
    default_size: ClassVar[int] = 768

    @property
    def learning_rate_center(self) -> float:
        """Higher than that of LoRA: singular values are larger than the entries of W."""
        return 1e-2

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the singular values that train."""
        return min(size, out_features, in_features)


class LolduSettings(ChangeSettings):
    """LoLDU (Shi et al. 2024): entries of the diagonal of W = P L D U train."""

    name: Literal["loldu"]
    rank: PositiveInt | None = Field(
        None,
        description="number of entries of D that train; 768 unless density solves it, at most all "
        "of a layer",
    )
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="factor of the change of D")

    implementation_class: ClassVar[str] = "loldu:Loldu"
    default_size: ClassVar[int] = 768

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the entries of D that train."""
        return min(size, out_features, in_features)


class MonarchSettings(ChangeSettings):
    """MoRe (Tan et al. 2024): a Monarch matrix, two block-diagonal factors and permutations."""

    name: Literal["monarch"]
    rank: PositiveInt | None = Field(None, description="of each block; 8 unless density solves it")
    blocks: PositiveInt = Field(4, description="number of blocks of either factor")

    implementation_class: ClassVar[str] = "monarch:Monarch"

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the entries of the blocks; the sides are padded to multiples of ``blocks``."""
        sides = sum(-(-side // self.blocks) for side in (out_features, in_features))
        return self.blocks * size * sides

    def largest_size(self, out_features: int, in_features: int) -> int:
        """Return the narrow side of a block."""
        return -(-min(out_features, in_features) // self.blocks)


class LoraSbSettings(ChangeSettings):
    """LoRA-SB (Ponkshe et al. 2024): B R A with R trained, from the first full step."""

    name: Literal["lora_sb"]
    init_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="learning rate of the full step that B R A approximates at the start"
    )

    implementation_class: ClassVar[str] = "lora_sb:LoraSb"

    @property
    def reads_batches(self) -> bool:
        """True: B and A come from gradients."""
        return True

    @property
    def starts_changed(self) -> str:
        """The first full step."""
        return "training starts after the first full step, as far as B R A can express it"

    def count(self, out_features: int, in_features: int, size: int) -> int:
        """Return the entries of R."""
        return min(size, out_features, in_features) ** 2


CHANGES: dict[str, type[MethodSettings]] = {
    "block_lora": BlockLoraSettings,
    "flora": FloraSettings,
    "loldu": LolduSettings,
    "lora_sb": LoraSbSettings,
    "monarch": MonarchSettings,
    "nola": NolaSettings,
    "svfit": SvfitSettings,
}
