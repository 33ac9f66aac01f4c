"""Settings of a PEFT type as a method. Imports no torch; ``check`` imports peft when it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator

from sparsegrad_cli.io.suggest import did_you_mean, listed, suggest
from sparsegrad_cli.methods.base import MethodSettings, SizeRange, Sizing, TargetShapes
from sparsegrad_cli.methods.peft_types.tuner_facts import (
    REPLACED,
    RUNNING,
    TUNERS,
    USELESS,
    Tuner,
    size_keys,
)
from sparsegrad_cli.numerics.sizing import count_for_density
from sparsegrad_cli.recipe.section import Density, Idle, SettingError

if TYPE_CHECKING:
    from sparsegrad_cli.models.targets import Target
    from sparsegrad_cli.recipe.schema import Recipe

_FROM_BATCHES = ("eva", "corda", "lora_ga")  # values of init_lora_weights


class PeftSettings(MethodSettings):
    """A PEFT type, with the keys of its own configuration: ``{name: peft, type: vera, r: 64}``."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: Literal["peft"]
    type: str = Field(description="a PeftType, such as vera; further keys are those of its config")
    density: Density | None = Field(
        None, description="with match: trainable, the type's size is solved from this"
    )

    solves_rank: ClassVar[bool] = True
    sized_by: ClassVar[frozenset[str]] = size_keys() | {"density"}
    rivals: ClassVar[tuple[str, ...]] = ("density", "r")
    training_only: ClassVar[frozenset[str]] = frozenset({"recompute", "density"})

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        name = value.upper()
        if name not in TUNERS:
            choices = tuple(known.lower() for known in RUNNING)
            raise SettingError(f"{value!r:.60} is not a PEFT type", fix=suggest(value, choices))
        if TUNERS[name].refusal:
            what = f"{name} does not fit a run: {TUNERS[name].refusal}"
            raise SettingError(what, fix=f"types that do: {listed(RUNNING, 50).lower()}")
        return name

    @classmethod
    def takes_density(cls, method: Mapping[str, Any]) -> bool:
        """Return whether the type has a size."""
        tuner = TUNERS.get(str(method.get("type")).upper())
        return tuner is not None and tuner.size is not None

    @property
    def tuner(self) -> Tuner:
        """What we know of the type."""
        return TUNERS[self.type]

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of PEFT's configuration that are set, with lists as PEFT expects them."""
        found: dict[str, Any] = _lists(self.__pydantic_extra__ or {})
        return found

    @property
    def starts_changed(self) -> str:
        """Why the model computes another function at the start than the base model; or empty."""
        keys = self.keys
        init = keys.get("init_weights", keys.get("init_lora_weights", keys.get("init_ia3_weights")))
        if init is False and self.type != "FOURIERFT":
            return "its initialization is switched off"
        if keys.get("kasa_config") is not None:
            return "KaSA takes the smallest singular values from the weights"
        return "" if self.type == "FOURIERFT" and init is True else self.tuner.start

    def check(self, recipe: Recipe) -> None:
        """Check the keys of the type's configuration, and ``density`` with ``match``."""
        self._check_size(recipe)
        config: Any = import_module("sparsegrad_cli.methods.peft_types.config")
        known = tuple(key for key in config.fields_of(self.type) if key not in REPLACED | USELESS)
        for key, value in self.keys.items():
            path = f"method.{key}"
            if key in REPLACED:
                raise SettingError("follows from the recipe", path, fix=REPLACED[key])
            if key in USELESS:
                raise SettingError(f"has no effect: {USELESS[key]}", path, fix="leave it out")
            if key not in known:
                near = did_you_mean(key, known)
                fix = near or f"keys of {self.type}: {listed(known, 40)}"
                raise SettingError(f"is not a key of PEFT's {self.type}", path, fix=fix)
            wrong = config.type_problem(self.type, key, value) or self._out_of_range(key, value)
            if wrong is not None:
                raise SettingError(wrong, path)
        if self.type == "SHIRA" and "random_seed" in self.keys:
            mask = self.keys.get("mask_type", "random")
            if mask != "random":
                what = f"has no effect: mask_type {mask} draws nothing"
                raise SettingError(what, "method.random_seed", fix="leave it out")
        problem = config.problem_of(self)
        if problem is not None:
            raise SettingError(f"PEFT refuses these settings: {problem}", "method.type")

    def _out_of_range(self, key: str, value: Any) -> str | None:
        """Return what is wrong with a number that PEFT would take until it makes the layers."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        size = self.tuner.size
        if key == "r" or (size is not None and size.key == key and size.kind == "number"):
            least = 1 if size is None or size.key != key else size.least
            return None if value >= least else f"expected at least {least}, got {value}"
        if key.endswith("dropout") and not 0 <= value < 1:
            return f"expected a share from 0 to below 1, got {value}"
        return None

    def _check_size(self, recipe: Recipe) -> None:
        size, density = self.tuner.size, "method.density"
        if size is None:
            return
        path = f"method.{size.key}"
        both = self.density is not None and size.key in self.keys
        if both:
            what = f"and method.density both say how large {self.type} is: give one of the two"
            fix = f"{path} alone, or method.density with match: trainable"
            raise SettingError(what, path, density, "match", fix=fix)
        if recipe.match and self.density is None:
            what = f"trainable solves method.{size.key} from method.density: give it"
            fix = "method.density: 0.01, or leave out match"
            raise SettingError(what, "match", density, fix=fix)
        if self.density is not None and not recipe.match:
            what = f"has an effect only with match: trainable, which solves {path}"
            fix = f"match: trainable, or {path} in place of method.density"
            raise SettingError(what, density, "match", fix=fix)

    def unused(self, recipe: Recipe) -> Iterator[Idle]:
        """Yield density and ``match`` where the type has one size."""
        if self.tuner.size is not None:
            return
        why, cause = f"{self.type} has one size", (("method", "type"),)
        if self.density is not None:
            yield Idle(("method", "density"), cause, why, "leave it out", None)
        if recipe.match is not None:
            yield Idle(("match",), cause, why, "leave it out", None)

    @property
    def learning_rate_center(self) -> float:
        """LoRA's center, or a larger rate for types that train vectors or spectra only.

        VeRA (2310.11454) and FourierFT (2405.03003) report rates of 2e-3 to 1e-1.
        """
        return 1e-2 if self.tuner.few else 2e-3

    @property
    def reads_batches(self) -> bool:
        """True for initializations and masks from activations or gradients."""
        keys = self.keys
        masked = self.type == "SHIRA" and keys.get("mask_type") in ("grad", "snip")
        return masked or keys.get("init_lora_weights") in _FROM_BATCHES

    @property
    def trains_lora_factors(self) -> bool:
        """True for LoRA and its variants; AdaLoRA's factors are those of an SVD."""
        return self.type == "LORA"

    def optimizer_refusal(self) -> tuple[str, str] | None:
        """Say which types keep averages beside AdamW's."""
        if self.type == "ADALORA":
            return "type", "AdaLoRA allocates ranks by averages in the state of AdamW"
        return None

    @property
    def beside_weights(self) -> bool:
        """True where a change beside the weights trains."""
        return self.tuner.beside

    def memory_savers(self, recipe: Recipe, phase: str) -> list[str]:
        """Return the setting that the size follows from."""
        size = self.tuner.size
        if size is None:
            return []
        return [f"another method.{'density' if self.density is not None else size.key}"]

    def quantization_refusal(self) -> tuple[str, str]:
        """Refuse quantized weights: most types need the weights themselves."""
        return "type", f"PEFT's {self.type} is run on weights that are not quantized"

    def sharding_refusal(self, how: str) -> tuple[str, str] | None:
        """Refuse split weights, with which these types were not checked."""
        return "type", f"PEFT's {self.type} was not checked with weights that {how} splits"

    # --- how large it is

    def sizing(self, shapes: TargetShapes) -> Sizing:
        """Return the number of parameters that PEFT's layers of these shapes train."""
        fitted = self.solved(shapes.targets)
        return Sizing(fitted.count(shapes.targets), fitted.size_text())

    def size_text(self) -> str:
        """Return the size as a user reads it, such as ``rank 12``."""
        size = self.tuner.size
        if size is None:
            return f"the one size of {self.type.lower()}"
        name = "rank" if size.key == "r" else size.key
        config: Any = import_module("sparsegrad_cli.methods.peft_types.config")
        value = getattr(config.make_config(self, ()), size.key)
        return f"{name} {value}" if value is not None else f"PEFT's default {name}"

    def size_range(self, shapes: TargetShapes) -> SizeRange | None:
        """Return the sizes of the key that a budget chooses; None if there is none."""
        size = self.tuner.size
        if size is None:
            return None
        targets = shapes.targets
        narrow = max(min(t.out_features, t.in_features) for t in targets)
        divisor = math.gcd(*(math.gcd(t.out_features, t.in_features) for t in targets))
        least, most = size.bounds(self.tuner.most or narrow, divisor & -divisor)
        limit = f"{size.key} of {self.type} goes no further on these layers"
        most = self._largest_useful(least, most, targets)
        fine = size.kind in ("share", "falling share") or self.tuner.most is not None
        return SizeRange(least, most, limit, fine=fine)

    def _largest_useful(self, least: int, most: int, targets: Sequence[Target]) -> int:
        """Return the largest size at which PEFT makes the layers and more of them train."""
        works = _first(least, most, lambda size: not self.with_size(size + 1).works(targets))
        count = self.with_size(works).count(targets)
        return _first(least, works, lambda size: self.with_size(size).count(targets) == count)

    def with_size(self, size: int) -> Self:
        """Return the settings with the value of the type's key at a size of :meth:`size_range`."""
        key = self.tuner.size
        assert key is not None  # size_range was not None
        return self.model_copy(update={key.key: key.value(size, self.keys), "density": None})

    @property
    def size_keys(self) -> frozenset[str]:
        """The key that sets this type's size, and ``density``."""
        size = self.tuner.size
        return frozenset({"density"} | ({size.key} if size else set()))

    def solved(self, targets: Sequence[Target]) -> Self:
        """Return the settings with the size that comes nearest to ``density``, where it is given.

        The number of parameters grows with the size, so that bisection finds it.
        """
        if self.density is None or self.tuner.size is None:
            return self
        sizes = self.size_range(TargetShapes(targets))
        assert sizes is not None
        requested = self.requested(targets)
        high = _first(
            sizes.least,
            sizes.most,
            lambda size: self.with_size(size).count(targets) >= requested,
        )
        found = [self.with_size(size) for size in {max(sizes.least, high - 1), high}]
        return min(found, key=lambda each: abs(each.count(targets) - requested))

    def requested(self, targets: Sequence[Target]) -> int:
        """Return the number of parameters over all targets that ``density`` asks for."""
        assert self.density is not None
        return sum(count_for_density(self.density, t.out_features, t.in_features) for t in targets)

    def count(self, targets: Sequence[Target]) -> int:
        """Return the number of parameters that train on layers of these shapes."""
        sizes: Any = import_module("sparsegrad_cli.methods.peft_types.layer_sizes")
        count: int = sizes.count(self, targets)
        return count

    def works(self, targets: Sequence[Target]) -> bool:
        """Return whether PEFT makes layers of these shapes with these settings."""
        sizes: Any = import_module("sparsegrad_cli.methods.peft_types.layer_sizes")
        works: bool = sizes.works(self, targets)
        return works

    def settle_for_estimate(self, shapes: TargetShapes) -> tuple[Self, list[str]]:
        """Refuse types that read the weights' values to find out what they train."""
        values = self.tuner.values
        if "monteclora_config" in self.keys:
            values = "PEFT checks the values of its distributions"
        if values:
            from sparsegrad_cli.errors import UsageError

            raise UsageError(
                f"the memory of {self.type} cannot be counted without values: {values}",
                where="method.type",
                fix="count a real one: `sparsegrad train` with train.max_steps=2",
            )
        notes = ["the initialization's own memory is not counted"] if self.reads_batches else []
        return self.solved(shapes.targets), notes

    @property
    def implemented_by(self) -> str:
        """``module:class`` of the implementation."""
        return "sparsegrad_cli.methods.peft_types.method:PeftTuner"


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the first number from ``low`` for which a property holds; ``high`` where none does.

    The property must hold for all larger numbers too. It is asked for the ends first: for most
    types they decide.
    """
    if low < high and not holds(high - 1):
        return high
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _lists(value: Any) -> Any:
    """Return lists in place of tuples, at any depth: recipes hold tuples, PEFT expects lists."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_lists(item) for item in value]
    return value
