"""Settings of SparseGrad, and the size of its core. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.base import SizeRange, Sizing, TargetShapes
from sparsegrad_cli.methods.sparse_settings import ALL_TRAIN, SparseSettings, count_text
from sparsegrad_cli.numerics.sizing import RANK_STEP, rank_for_counts
from sparsegrad_cli.recipe.section import (
    FROM_GRADIENTS,
    OVER_TOKENS,
    Bytes,
    Idle,
    PositiveInt,
    SettingError,
    parse_bytes,
)

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe


class SparsegradSettings(SparseSettings):
    """SparseGrad (Chekalina et al. 2024): the largest entries of Q_out' G Q_in."""

    name: Literal["sparsegrad"]
    form: Literal["core", "rotated", "materialized"] = Field(
        "core",
        description="core: W frozen, a small core beside it; rotated: the paper's layer; "
        "materialized: its updates on the plain layer",
    )
    support: Literal["static", "dynamic", "refresh", "dense"] = Field(
        "static",
        description="static: chosen once (default of the core form); dynamic: chosen again in "
        "every step (the other forms do only this); refresh: chosen again every refresh_steps; "
        "dense: all of the core",
    )
    refresh_steps: PositiveInt | None = Field(
        None, description="refresh: number of optimizer steps between choices; 100 by default"
    )
    state_capacity: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="dynamic: limit of the parameters with optimizer state, as a multiple of "
        "those chosen in a step; beyond it, those not updated for longest lose their state; "
        "null keeps state for all",
    )
    rank: PositiveInt | Annotated[float, Field(gt=0, le=1)] | Bytes | None = Field(
        None,
        description="core: number of directions per side, the share of energy that they hold, or "
        "the bytes for bases and cores of all targets, such as 64MiB; by default, the rank at "
        "which the density fills a third of the core (all of it with support dense)",
    )
    allocation: Literal["target", "model"] = Field(
        "target",
        description="static: the density applies to each target, or to all of them together",
    )

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"recompute", "state_capacity", "refresh_steps"}
    )

    @model_validator(mode="before")
    @classmethod
    def _support_of_the_form(cls, data: Any) -> Any:
        """Fill in the support that goes with the form, so that a resolved recipe says it."""
        if isinstance(data, dict) and "support" not in data:
            form = data.get("form", cls.model_fields["form"].default)
            return {**data, "support": "static" if form == "core" else "dynamic"}
        return data

    @model_validator(mode="after")
    def _fits_the_form(self) -> Self:
        if self.allocation == "model" and self.support != "static":
            raise SettingError(
                "allocation 'model' is for support 'static'", "allocation", "support"
            )
        if self.refresh_steps is not None and self.support != "refresh":
            raise SettingError("refresh_steps is for support 'refresh'", "refresh_steps", "support")
        if self.state_capacity is not None and self.support != "dynamic":
            raise SettingError(
                "state_capacity is for support 'dynamic'", "state_capacity", "support"
            )
        if self.form == "core":
            return self
        if self.support != "dynamic":
            what = f"form {self.form} chooses in every step: support is dynamic"
            raise SettingError(what, "support", "form")
        if self.rank is not None:
            what = f"form {self.form} is of full rank: rank is for form core"
            raise SettingError(what, "rank", "form")
        return self

    # --- how recipes and studies treat the settings

    @property
    def learning_rate_center(self) -> float:
        """Geometric mean, to one digit, of the rates that tuning chose.

        The core 1e-3 (sst2), 4e-3 (cola) and 5e-4 (OpenAssistant with SmolLM2-135M), the forms of
        the paper 2e-3 and 5e-4; all of a core 2e-4 by score and 5e-4 by loss.
        """
        return 3e-4 if self.support == "dense" else 1e-3

    @classmethod
    def calibration_defaults(
        cls, method: Mapping[str, Any], calibration: dict[str, Any]
    ) -> dict[str, Any]:
        """Fill in the calibration of the core form: sums over tokens, a warm head, thin products.

        docs/results/index.md has their energy, scores and cost beside other settings. The other
        forms keep what the paper does.
        """
        if method.get("form", cls.model_fields["form"].default) != "core":
            return calibration
        filled = {"steps": 12, "warmup_steps": 50, **calibration}
        if filled.get("decomposition") != "sequential":
            filled.setdefault("source", "token")
        # A share of the energy can only be told from all of it.
        if not isinstance(method.get("rank"), float) and filled.get("source") in FROM_GRADIENTS:
            filled.setdefault("decomposition", "randomized")
        return filled

    def check(self, recipe: Recipe) -> None:
        """Check that the calibration makes what the form and the allocation need."""
        calibration = recipe.calibration
        if calibration.decomposition == "randomized" and not self.thin_bases:
            raise SettingError(
                "'randomized' finds a given number of directions: it needs method.form 'core', and "
                "a method.rank that is not a share of energy",
                "calibration.decomposition",
                "method.form",
                "method.rank",
            )
        if calibration.decomposition == "sequential" and self.form != "core":
            what = "'sequential' truncates: it needs method.form 'core'"
            raise SettingError(what, "calibration.decomposition", "method.form")
        comparable = calibration.score != "spectral" or calibration.source in OVER_TOKENS
        if self.compares_targets and not comparable:
            raise SettingError(
                "'model' compares targets: it needs a calibration.score from gradients, or "
                "calibration.source 'token'",
                "method.allocation",
                "calibration.score",
                "calibration.source",
            )

    def unused(self, recipe: Recipe) -> Iterator[Idle]:
        """Yield a size that is given twice, and a score that chooses nothing."""
        if self.support == "dense" and self.rank is not None:
            cause = (("method", "rank"),)
            why = "support 'dense' trains all of the core, and method.rank says how large that is"
            fix = "give only one of them"
            default = type(self).model_fields["density"].default
            if self.entries is not None:
                yield Idle(("method", "entries"), cause, why, fix, None)
            if self.density != default:
                yield Idle(("method", "density"), cause, why, fix, default)
        if self.support not in ("static", "refresh") and recipe.calibration.score != "spectral":
            why = "calibration.score chooses a static support, and method.support is "
            cause = (("method", "support"),)
            key = ("calibration", "score")
            yield Idle(key, cause, f"{why}{self.support!r}", "leave it out", "spectral")

    @property
    def notes(self) -> list[str]:
        """Say for which target modules a core of this rank is too small for the density."""
        whole = not isinstance(self.rank, int) or self.support == "dense"
        if whole or self.density is None:
            return []
        assert isinstance(self.rank, int)
        side, largest = self.rank, int(self.rank**2 / self.density)
        return [
            f"cores of method.rank {side} are at most {side} x {side}: method.density "
            f"{self.density:g} asks for more in target modules of more than {largest:,} parameters"
        ]

    # --- what the method can do

    @property
    def calibrates(self) -> bool:
        """True."""
        return True

    @property
    def beside_weights(self) -> bool:
        """Whether a core trains, rather than the weights in another basis."""
        return self.form == "core"

    @property
    def basis_rank(self) -> int | float | None:
        """The rank of a settled core; None for the other forms, which are of full rank."""
        return self.rank if isinstance(self.rank, int | float) else None

    @property
    def thin_bases(self) -> bool:
        """Whether calibration may find the leading directions alone (``randomized``)."""
        return self.form == "core" and not isinstance(self.rank, float)

    @property
    def compares_targets(self) -> bool:
        """Whether the parameters are allocated over the whole model."""
        return self.allocation == "model"

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return shared bases, and for a core thin products or a smaller rank."""
        calibration, ways = recipe.calibration, []
        if calibration.basis_per == "layer":
            ways.append("calibration.basis_per=kind")
        if phase == "calibrate" and self.thin_bases and calibration.decomposition == "exact":
            ways.append("calibration.decomposition=randomized")
        if phase == "prepare" and self.form == "core":
            ways.append("a smaller method.rank")
        return ways

    def quantization_refusal(self) -> tuple[str, str] | None:
        """Return the form that trains the weights."""
        return None if self.form == "core" else ("form", f"form {self.form} trains the weights")

    def optimizer_refusal(self) -> tuple[str, str] | None:
        """Return the form or support that AdamW is part of."""
        if self.form != "core":
            return "form", f"form {self.form} chooses parameters by an AdamW of its own"
        if self.support not in ("static", "dense"):
            return "support", f"support {self.support} chooses parameters by an AdamW of its own"
        return None

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Return the form or support that needs whole matrices."""
        if self.form != "core":
            return "form", f"form {self.form} needs whole matrices, and {how} splits them"
        if self.support not in ("static", "dense"):
            what = f"support {self.support} chooses among all entries of a core: {how} splits it"
            return "support", what
        return None

    # --- how large it is

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the parameters of the supports that train at a time, and the core's rank."""
        requested = self.requested(shapes.targets)
        if self.form != "core":
            count = sum(requested.values())
            return Sizing(count, count_text(count, shapes.parameters))
        rank = self._rank_on(shapes)
        rooms = _core_sizes(shapes.targets, rank)
        if self.support == "dense":
            return Sizing(sum(rooms.values()), f"core of rank {rank}")
        count = sum(min(requested[name], room) for name, room in rooms.items())
        return Sizing(count, f"{count_text(count, shapes.parameters)}, core of rank {rank}")

    def size_range(self, shapes: TargetShapes) -> SizeRange:
        """Return ranks of a dense core, else numbers of parameters."""
        targets = shapes.targets
        if self.support == "dense":
            wide = max(max(t.out_features, t.in_features) for t in targets)
            return SizeRange(1, wide, "the core is as wide as the layers")
        advice = "bound it by method.state_capacity"
        least, most, bounded = len(targets), shapes.parameters, self.state_capacity is not None
        if self.form != "core":
            # All parameters have optimizer state and gradients: choosing more of them costs none.
            return SizeRange(least, most, ALL_TRAIN, True, bounded, advice)
        if self.rank is None:
            levels = _RankLevels(self, shapes, least, most)
            return SizeRange(least, most, ALL_TRAIN, True, levels=levels)
        rank = self._rank_on(shapes)
        room = sum(_core_sizes(targets, rank).values())
        sizes = range(least, most + 1)  # split by the layers' size, cores fill unequally
        full = bisect_left(sizes, room, key=lambda n: self.with_size(n).sizing(shapes).trainable)
        limit = f"every parameter of a core of rank {rank} trains"
        bounded = bounded or self.support in ("static", "refresh")
        return SizeRange(least, sizes[full], limit, True, bounded, advice)

    def with_size(self, size: int) -> Self:
        """Return the settings at a rank of a dense core, or at a number of parameters."""
        if self.support == "dense":
            return self.model_copy(update={"rank": size})
        return super().with_size(size)

    @property
    def size_keys(self) -> frozenset[str]:
        """The density or number; the rank too where it alone says how large the core is."""
        return super().size_keys | ({"rank"} if self.support == "dense" else set())

    def notes_on(self, shapes: TargetShapes) -> list[str]:
        """Say how many parameters the cores lack of those that density or ``entries`` asks for."""
        if self.form != "core" or self.support == "dense" or not isinstance(self.rank, int):
            return []
        asked = sum(self.requested(shapes.targets).values())
        trained = self.sizing(shapes).trainable
        if trained == asked:
            return []
        size = "entries" if self.density is None else "density"
        return [
            f"cores of rank {self.rank} train {trained:,} of the {asked:,} parameters that "
            f"method.{size} asks for: raise method.rank, or lower method.{size}"
        ]

    def settle(self, shapes: TargetShapes) -> Self:
        """Return the settings of a core whose rank is a number of directions or a share of energy.

        Raises:
            UsageError: not even rank 1 fits the bytes that ``rank`` allows; says what to change.
        """
        if self.form != "core" or isinstance(self.rank, int | float):
            return self
        if self.rank is None:
            rank = rank_for_density(self, shapes.targets)
        else:
            rank = rank_in_budget(parse_bytes(self.rank), shapes)
            if rank == 0:
                raise UsageError(
                    f"method.rank: bases and cores of rank 1 take more than {self.rank}",
                    where=shapes.where,
                    fix="allow more, or calibration.basis_per: kind, which shares bases",
                )
        return self.model_copy(update={"rank": rank})

    def settle_for_estimate(self, shapes: TargetShapes) -> tuple[Self, list[str]]:
        """Return settings whose rank is a number and whose support is split evenly.

        Raises:
            UsageError: the rank is a share of energy; or as :meth:`settle`.
        """
        if isinstance(self.rank, float):
            raise UsageError(
                f"method.rank {self.rank:g} is a share of energy: which rank that is, only "
                "calibration on real data can say",
                where=shapes.where,
                fix="give a number of directions, or the bytes they may take",
            )
        settled, notes = self.settle(shapes), []
        if settled.allocation == "model":
            notes.append("allocation: the same number of parameters, split evenly over the targets")
            settled = settled.model_copy(update={"allocation": "target"})
        return settled, notes

    def with_basis_rank(self, rank: int) -> Self:
        """Return the settings of a core of this rank; the other forms keep their full rank."""
        return self.model_copy(update={"rank": rank}) if self.form == "core" else self

    def _rank_on(self, shapes: TargetShapes) -> int:
        rank = self.settle_for_estimate(shapes)[0].rank
        assert isinstance(rank, int)
        return rank

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation of the form."""
        form = "core:SparsegradCore" if self.form == "core" else "rotated:Sparsegrad"
        return f"sparsegrad_cli.methods.sparsegrad.{form}"


def _core_sizes(targets: Sequence[Target], rank: int) -> dict[str, int]:
    """Return target name -> number of parameters of its core at this rank."""
    return {t.name: min(rank, t.out_features) * min(rank, t.in_features) for t in targets}


def rank_for_density(settings: SparsegradSettings, targets: Sequence[Target]) -> int:
    """Return the smallest multiple of 8 whose core the density fills to a third (dense: wholly)."""
    counts = settings.requested(targets).values()
    widest = max(max(t.out_features, t.in_features) for t in targets)
    return min(widest, rank_for_counts(counts, dense=settings.support == "dense"))


def rank_in_budget(budget: int, shapes: TargetShapes) -> int:
    """Return the largest rank whose bases and cores take at most ``budget`` bytes; 0 if none does.

    Bases are counted once per basis, and four numbers per parameter of a core (value, gradient,
    two moments), all in float32: what stays in memory whatever the batch is.
    """
    targets = shapes.targets
    shared = {t.kind if shapes.basis_per == "kind" else t.name: t for t in targets}
    sides = [(t.out_features, t.in_features) for t in shared.values()]

    def taken(rank: int) -> int:
        bases = sum(min(rank, side) * side for pair in sides for side in pair)
        return 4 * (bases + 4 * sum(_core_sizes(targets, rank).values()))

    widest = max(side for pair in sides for side in pair)
    return bisect_right(range(1, widest + 1), budget, key=taken)  # taken() grows with the rank


class _RankLevels:
    """The first size of each rank of a core whose rank follows its number of parameters."""

    def __init__(
        self, settings: SparsegradSettings, shapes: TargetShapes, least: int, most: int
    ) -> None:
        self._settings, self._shapes = settings, shapes
        self._sizes = range(least, most + 1)
        self._steps = range(self._rank(least) + 1, self._rank(most) + 1, RANK_STEP)

    def _rank(self, size: int) -> int:
        return rank_for_density(self._settings.with_size(size), self._shapes.targets)

    def __len__(self) -> int:
        return 1 + len(self._steps)

    def start(self, level: int) -> int:
        """Return the first size of a level, counted from 0."""
        if level == 0:
            return self._sizes[0]
        return self._sizes[bisect_left(self._sizes, self._steps[level - 1], key=self._rank)]

    def is_last(self, size: int) -> bool:
        """Return whether the next larger size is of a higher rank."""
        return self._rank(size + 1) > self._rank(size)
