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

    Subclasses declare ``name`` and :attr:`implementation_class`, and say :meth:`count`. Where
    another key than ``rank`` says the size, they name it in :attr:`size_key`.
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
        size, density, given = f"method.{self.size_key}", "method.density", self.size is not None
        if given and self.density is not None:
            what = f"and method.density both say how large {self.name} is: give one of the two"
            fix = f"{size} alone, or method.density with match: trainable"
            raise SettingError(what, size, density, "match", fix=fix)
        if recipe.match and given:
            what = "is what match: trainable solves from method.density: give one of the two"
            fix = f"leave out match, or give method.density in place of {size}"
            raise SettingError(what, size, "match", fix=fix)
        if recipe.match and self.density is None:
            what = f"trainable solves {size} of {self.name} from method.density: give it"
            raise SettingError(what, "match", density, fix="method.density: 0.01")
        if self.density is not None and not recipe.match:
            what = f"of {self.name} has an effect only with match: trainable, which solves {size}"
            fix = f"match: trainable, or {size} in place of method.density"
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
