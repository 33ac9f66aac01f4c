"""The contract of a method. Imports no torch, so that reading a recipe stays fast.

A method has two halves, and no code outside this package names a method or tests its type:

:class:`MethodSettings`, in ``methods/<name>/settings.py``
    The ``method`` section of a recipe. It answers every question that needs no weights: what may
    be set and what goes together, what the method can do (calibrate, train beside frozen weights,
    run on split or quantized weights), how large it is on given shapes, and where its learning
    rates lie. Each answer has a default, so a small method overrides few of them.

:class:`sparsegrad_cli.methods.implementation.Method`, in ``methods/<name>/method.py``
    What changes a model: prepare it, make its optimizer, save and load what was trained, merge it.
    :meth:`MethodSettings.implementation` imports it when it is needed.

``methods/registry.py`` lists the settings classes. ``docs/how-to/add-a-method.md`` adds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field

from sparsegrad_cli.recipe.section import Idle, Section

if TYPE_CHECKING:
    from sparsegrad_cli.methods.implementation import Method
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
    from sparsegrad_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class TargetShapes:
    """The target modules of a model, as far as the size of a method depends on them.

    Attributes:
        targets: the target modules, in the model's order.
        basis_per: ``layer`` or ``kind``: the targets that share a basis.
        where: the place of ``method.rank`` in the recipe, for errors.
    """

    targets: Sequence[Target]
    basis_per: str = "layer"
    where: str = "method.rank"

    @classmethod
    def of(cls, loaded: LoadedRecipe, targets: Sequence[Target]) -> TargetShapes:
        """Return the shapes of a recipe's targets."""
        basis_per = loaded.recipe.calibration.basis_per
        return cls(targets, basis_per, loaded.where("method.rank"))

    @property
    def parameters(self) -> int:
        """Number of parameters of the targets' weights."""
        return sum(target.size for target in self.targets)


@dataclass(frozen=True)
class Sizing:
    """The size of a method on given shapes.

    Attributes:
        trainable: parameters of the target modules that one optimizer step changes.
        text: the size as a user reads it, such as ``rank 12``.
    """

    trainable: int
    text: str


class SizeLevels(Protocol):
    """Where memory jumps as a size grows: a level is a range of sizes without a jump."""

    def __len__(self) -> int: ...

    def start(self, level: int) -> int:
        """Return the first size of a level, counted from 0."""
        ...

    def is_last(self, size: int) -> bool:
        """Return whether the next larger size belongs to the next level."""
        ...


@dataclass(frozen=True)
class SizeRange:
    """The sizes that a budget may choose from: whole numbers from ``least`` to ``most``.

    Attributes:
        fine: there are so many sizes that the next one makes no visible difference.
        limit: why there is no size above ``most``.
        costs_memory: whether a step with a larger size needs more memory.
        advice: what bounds the memory where it does not depend on the size.
        levels: where memory jumps; None where it grows evenly.
        trains_all: the same parameters train at every size, which only changes the memory.
    """

    least: int
    most: int
    limit: str
    fine: bool = False
    costs_memory: bool = True
    advice: str = ""
    levels: SizeLevels | None = None
    trains_all: bool = False


class MethodSettings(Section):
    """The ``method`` section of a recipe, and what every method answers without weights.

    Subclasses declare ``name: Literal["<name>"]`` and say :attr:`implemented_by` and
    :meth:`sizing`; they override what differs from the defaults below.
    """

    name: str
    recompute: Literal["none", "activation"] = Field(
        "none",
        description="activation: compute the MLP's activation again in the backward pass, which "
        "saves memory and costs one matrix product",
    )

    # --- how recipes and studies treat the settings

    solves_rank: ClassVar[bool] = False
    """Whether ``match: trainable`` solves its rank from ``density``."""
    chooses_by_density: ClassVar[bool] = False
    """Whether ``density`` says how many parameters it chooses. The density of one such method then
    carries over to another."""
    sized_by: ClassVar[frozenset[str]] = frozenset({"density", "entries"})
    """Keys that can set how many parameters it trains."""
    rivals: ClassVar[tuple[str, ...]] = ()
    """Keys that replace each other: the one in the stronger layer of settings prevails."""
    training_only: ClassVar[frozenset[str]] = frozenset({"recompute"})
    """Keys that say how the method trains, and not what its adapter is."""
    peft_type: ClassVar[str | None] = None
    """``peft_type`` of the PEFT folders that training can start from (``init_from``)."""

    @classmethod
    def calibration_defaults(
        cls, method: Mapping[str, Any], calibration: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a recipe's calibration section with this method's defaults filled in.

        Args:
            method: this section as the recipe says it, not yet checked.
            calibration: the calibration section, likewise.
        """
        return calibration

    @classmethod
    def takes_density(cls, method: Mapping[str, Any]) -> bool:
        """Return whether ``density`` says how large the method is.

        Args:
            method: this section as the recipe says it, not yet checked.
        """
        return "density" in cls.model_fields

    def check(self, recipe: Recipe) -> None:
        """Check the recipe's other sections against these settings.

        Raises:
            SettingError: two settings contradict each other; its keys are relative to the recipe.
        """

    def unused(self, recipe: Recipe) -> Iterator[Idle]:
        """Yield the settings of the recipe that have no effect because of these settings."""
        return iter(())

    @property
    def notes(self) -> list[str]:
        """What a user should know of these settings, whatever the model is."""
        return []

    @property
    def learning_rate_center(self) -> float:
        """Center of the learning rates that tuning tries by default."""
        return 1e-3

    # --- what the method can do

    @property
    def calibrates(self) -> bool:
        """Whether it needs a basis."""
        return False

    @property
    def reads_batches(self) -> bool:
        """Whether it initializes from ``calibration.steps`` batches of the training data."""
        return False

    @property
    def beside_weights(self) -> bool:
        """Whether the targets' weights stay frozen and a change beside them trains.

        Weight decay then pulls the change towards zero, so the weights towards what they were
        before training. Otherwise it pulls the weights themselves towards zero.
        """
        return False

    @property
    def starts_changed(self) -> str:
        """Why the model computes something else before the first step; empty where it does not."""
        return ""

    @property
    def splits_batches(self) -> bool:
        """Whether gradients may accumulate over parts of a batch without changing the update."""
        return True

    @property
    def basis_rank(self) -> int | float | None:
        """Directions per side that it keeps of a basis, or the share of energy; None for all."""
        return None

    @property
    def compares_targets(self) -> bool:
        """Whether its basis must say how many tokens each target has seen."""
        return False

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return changes to the recipe that save memory in ``calibrate`` or ``prepare``."""
        return []

    def quantization_refusal(self) -> tuple[str, str] | None:
        """Return (key, what it does) where it cannot train on quantized, thus frozen, weights."""
        return None if self.beside_weights else ("name", f"{self.name} trains the weights")

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Return (key, why not) where it cannot train on weights that FSDP or DeepSpeed split.

        Args:
            how: what splits the weights, for the sentence.
        """
        return None

    def optimizer_refusal(self) -> tuple[str, str] | None:
        """Return (key, why) where the optimizer is part of the method, so that it must be AdamW."""
        return None

    @property
    def trains_lora_factors(self) -> bool:
        """Whether the factors A and B of LoRA train, so that ``lora_plus_ratio`` has an effect."""
        return False

    # --- how large it is

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the size on these shapes.

        Raises:
            UsageError: the settings ask for more than the targets have, or the size depends on
                real gradients.
        """
        raise NotImplementedError

    def size_range(self, shapes: TargetShapes) -> SizeRange | None:
        """Return the sizes that a budget may choose from; None where there is only one."""
        return None

    def with_size(self, size: int) -> Self:
        """Return the settings at a size of :meth:`size_range`."""
        raise NotImplementedError

    @property
    def size_keys(self) -> frozenset[str]:
        """Keys that fix the size where a study's row names one: a budget then leaves it alone."""
        return self.sized_by

    def notes_on(self, shapes: TargetShapes) -> list[str]:
        """Return what a user should know of the size on these shapes, after :meth:`settle`."""
        return []

    def settle(self, shapes: TargetShapes) -> Self:
        """Return the settings with what follows from the shapes filled in, such as a rank.

        Raises:
            UsageError: no size fits what was asked for.
        """
        return self

    def settle_for_estimate(self, shapes: TargetShapes) -> tuple[Self, list[str]]:
        """Return settings that need no values, only shapes, and notes on what was assumed.

        Raises:
            UsageError: the memory depends on real gradients.
        """
        return self.settle(shapes), []

    def with_basis_rank(self, rank: int) -> Self:
        """Return the settings for a basis that was cut to ``rank`` directions per side."""
        return self

    def settle_from_adapter(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return the settings with what follows from a trained adapter filled in.

        Args:
            shapes: name -> shape of the adapter's tensors.
        """
        return self

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that an ``adapter_config.json`` of :attr:`peft_type` says.

        Further keys are features that this method lacks, with the value that means "not used".
        """
        raise NotImplementedError

    # --- the other half

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        raise NotImplementedError

    def implementation(self) -> Method:
        """Import the implementation, and return one for these settings."""
        module, _, name = self.implemented_by.partition(":")
        made: Method = getattr(import_module(module), name)(self)
        return made
