"""The ``method`` section of a recipe: one class per method. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparsegrad_cli.recipe.section import Bytes, Density, PositiveInt, Section, SettingError


class _Method(Section):
    """What every method's section says and answers."""

    recompute: Literal["none", "activation"] = Field(
        "none",
        description="compute the MLP's activation again in the backward pass: less memory, "
        "one product more",
    )

    @property
    def calibrates(self) -> bool:
        """Whether it needs a basis."""
        return False

    @property
    def beside_weights(self) -> bool:
        """Whether the targets' weights stay frozen and a change beside them trains.

        Weight decay then pulls the change towards zero, so the weights towards what they were
        before training. Otherwise it pulls the weights themselves towards zero.
        """
        return False


class FullMethod(_Method):
    """Every entry of every target trains."""

    name: Literal["full"]


class LoraMethod(_Method):
    """LoRA (Hu et al. 2021) by the peft library."""

    name: Literal["lora"]
    rank: PositiveInt | None = Field(None, description="8 unless density solves it")
    density: Density | None = Field(
        None, description="with match: trainable, rank is solved from this"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="2 x rank by default")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False

    @property
    def beside_weights(self) -> bool:
        """True: A and B train."""
        return True


class _SparseMethod(_Method):
    """What a method says that chooses entries: how many."""

    name: str
    density: Density | None = 0.01
    entries: PositiveInt | None = Field(
        None, description="in place of density: entries of all targets together, shared by size"
    )

    @model_validator(mode="before")
    @classmethod
    def _entries_or_density(cls, data: Any) -> Any:
        """With ``entries``, the density's default says nothing."""
        if isinstance(data, dict) and data.get("entries") is not None:
            return {"density": None, **data}
        return data

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.density is None) == (self.entries is None):
            what = "density or entries says how many entries train: give one of the two"
            raise SettingError(what, "density", "entries")
        return self


class MepropMethod(_SparseMethod):
    """MeProp: ``entries`` keeps the largest |dL/dW|; ``rows`` (Sun et al. 2017) of |dL/dy|."""

    name: Literal["meprop"]
    select: Literal["entries", "rows"] = "entries"
    state_capacity: Annotated[float, Field(ge=1)] | None = Field(
        None, description="entries: as in sparsegrad"
    )
    unified: bool = Field(
        False, description="rows: one choice for the whole batch instead of one per example"
    )


class SparsegradMethod(_SparseMethod):
    """SparseGrad (Chekalina et al. 2024): the largest entries of Q_out' G Q_in."""

    name: Literal["sparsegrad"]
    form: Literal["core", "rotated", "materialized"] = Field(
        "core",
        description="core: W frozen, a small core beside it; rotated: the paper's layer; "
        "materialized: its updates on the plain layer",
    )
    support: Literal["static", "dynamic", "refresh", "dense"] = Field(
        "static",
        description="static: chosen once (core's default); dynamic: anew in every step (the other "
        "forms' only way); refresh: anew every refresh_steps; dense: all of the core",
    )
    refresh_steps: PositiveInt | None = Field(
        None, description="refresh: optimizer steps that a choice holds; 100 by default"
    )
    state_capacity: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="dynamic: entries with optimizer state, in multiples of those chosen in a "
        "step; at the limit the longest untouched are forgotten; null keeps state for all",
    )
    rank: PositiveInt | Annotated[float, Field(gt=0, le=1)] | Bytes | None = Field(
        None,
        description="core: directions kept a side, the share of energy they hold, or the bytes "
        "that bases and cores of all targets may take, such as 64MiB; by default as many as make "
        "the density fill a third of the core (all of it with support dense)",
    )
    allocation: Literal["target", "model"] = Field(
        "target",
        description="static: the density holds in every target, or over all of them together",
    )

    @property
    def calibrates(self) -> bool:
        """True."""
        return True

    @property
    def beside_weights(self) -> bool:
        """Whether a core trains, rather than the weights in another basis."""
        return self.form == "core"

    @model_validator(mode="before")
    @classmethod
    def _support_of_the_form(cls, data: Any) -> Any:
        """What is not said follows the form, so that a resolved recipe says it."""
        if isinstance(data, dict) and "support" not in data:
            form = data.get("form", cls.model_fields["form"].default)
            return {**data, "support": "static" if form == "core" else "dynamic"}
        return data

    @model_validator(mode="after")
    def _fits_the_form(self) -> SparsegradMethod:
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


MethodSection = Annotated[
    FullMethod | LoraMethod | MepropMethod | SparsegradMethod, Field(discriminator="name")
]
METHODS: dict[str, type[_Method]] = {
    "full": FullMethod,
    "lora": LoraMethod,
    "meprop": MepropMethod,
    "sparsegrad": SparsegradMethod,
}
METHOD_NAMES = tuple(METHODS)
