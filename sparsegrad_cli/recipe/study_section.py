"""Define the keys of a study file. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from sparsegrad_cli.recipe.budget import NOTHING, Budget, parse_match
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.recipe.section import (
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    SettingError,
)
from sparsegrad_cli.recipe.yaml_source import shorten

Positive = Annotated[float, Field(gt=0)]
# The paper's seeds first, then a plain sequence.
SEEDS = (42, 3705, 2023, 1, 2, 3, 4, 5, 6, 7)
TUNING_SEED = 101  # default seed of tuning; not one of the default seeds of the reported runs


class MethodEntry(Section):
    """One row of the comparison: a method, and its changes to the recipe.

    ``lora`` alone is short for ``{label: lora, method: {name: lora}}``; an entry with
    ``learning_rates: [1e-3, 2e-3]`` is short for two rows, ``lora-1e-3`` and ``lora-2e-3``.
    """

    label: str = Field(
        min_length=1,
        max_length=80,
        pattern=r"^[\w.+-]+$",
        description="name of the row; the method's name by default",
    )
    method: dict[str, Any] = Field(description="as in a recipe")
    train: dict[str, Any] = Field({}, description="keys of train for this row")
    calibration: dict[str, Any] = Field({}, description="keys of calibration for this row")
    targets: dict[str, Any] = Field(
        {}, description="other target modules than the recipe's; name the keys under differ"
    )
    matched: bool = Field(
        True, description="false: this row runs as the recipe says, without a budget or match"
    )


class TaskEntry(Section):
    """One task: its name, and its changes to the recipe (``task``, ``train``).

    ``methods`` maps a method's label to the method's ``train`` settings on this task, such as a
    learning rate that was tuned there.
    """

    name: str = Field(description="as task.name in a recipe")
    task: dict[str, Any] = Field({}, description="keys of task for this task")
    train: dict[str, Any] = Field({}, description="keys of train for this task")
    methods: dict[str, dict[str, Any]] = Field(
        {}, description="keys of train for a row on this task, by the row's label"
    )


class Figure(Section):
    """Published results of a method on a task, which the report shows next to ours."""

    source: str = Field(description="where the results were published")
    task: str = Field(description="a task of the study, or `average` over all of them")
    method: str = Field(description="label of a row of the study")
    score: float | None = Field(None, description="a fraction: 0.688 for 68.8; a loss as it is")
    std: float | None = Field(None, description="standard deviation of the score over seeds")
    steps_per_s: Positive | None = Field(None, description="optimizer steps per second")
    peak_mb: Positive | None = Field(None, description="megabytes of 1,000,000 bytes")
    learning_rate: Positive | None = Field(None, description="found by tuning")

    @model_validator(mode="after")
    def _says_something(self) -> Figure:
        if all(v is None for v in (self.score, self.steps_per_s, self.peak_mb, self.learning_rate)):
            raise ValueError("give score, steps_per_s, peak_mb or learning_rate")
        if self.std is not None and self.score is None:
            raise ValueError("std needs a score")
        return self


class SlurmSettings(Section):
    """How runs are submitted to Slurm. The names are those of submitit."""

    partition: str | None = Field(None, description="partition of the cluster")
    account: str | None = Field(None, description="account that pays for the jobs")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that a node must have")
    timeout_min: PositiveInt = Field(
        240, description="time limit of a job; a run that reaches it saves and is queued again"
    )
    gpus_per_node: NonNegativeInt | None = Field(None, description="GPUs of a job")
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs of a job")
    mem_gb: Positive | None = Field(None, description="memory of a job, in gigabytes")
    setup: tuple[str, ...] = Field(
        (), description="shell commands before a run, `module load cuda`"
    )
    additional_parameters: dict[str, str | int | bool] = Field(
        {}, description="further options of sbatch, without dashes in front"
    )
    cluster: Literal["slurm", "local"] = Field(
        "slurm", description="local: submitit's local executor, to try the engine without Slurm"
    )

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit's executor."""
        shared = ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb")
        own = ("partition", "account", "qos", "constraint", "setup", "additional_parameters")
        found = {name: getattr(self, name) for name in shared}
        found |= {f"slurm_{name}": getattr(self, name) for name in own}
        found["slurm_setup"] = list(self.setup)
        return {name: value for name, value in found.items() if value not in (None, {}, [])}


class RaySettings(Section):
    """How runs are submitted to Ray."""

    address: str | None = Field(
        None, description="of a cluster, or auto; by default RAY_ADDRESS, else only this machine"
    )
    num_cpus: Positive = Field(1.0, description="CPUs that a run reserves")
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs that a run reserves; by default one where the cluster has any"
    )


class EngineSection(Section):
    """Where the runs of a study train."""

    name: Literal["local", "slurm", "ray"] = Field(
        "local", description="a run is a process here, a Slurm job, or a Ray task"
    )
    jobs: PositiveInt | None = Field(
        None, description="runs at once; by default 1 for local and 32 for a cluster"
    )
    slurm: SlurmSettings = Field(SlurmSettings(), description="settings of engine slurm")
    ray: RaySettings = Field(RaySettings(), description="settings of engine ray")


# --- tuning


class RateSpace(Section):
    """Learning rates: log-uniform, the same number of decades about each method's centre."""

    decades: Annotated[float, Field(gt=0, le=6)] = Field(
        2.0, description="width of the space, in powers of ten"
    )
    centres: dict[str, Positive] = Field(
        {},
        description="centre for each row's label; by default the row's own rate in the study, "
        "else one measured for its method (docs/how-to/compare-methods.md)",
    )


class Range(Section):
    """Numbers from ``low`` to ``high``, uniform or log-uniform."""

    low: float = Field(description="lowest value")
    high: float = Field(description="highest value")
    log: bool = Field(False, description="log-uniform instead of uniform")

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("log: true needs a low above 0")
        return self


def _kind(value: Any) -> str:
    return "tuple[]" if isinstance(value, tuple) else "range[]"


# A discriminated union, so that an error refers to the intended kind. The tags have brackets,
# because error messages leave out names with a bracket.
Numbers = Annotated[
    Annotated[Range, Tag("range[]")]
    | Annotated[tuple[float, ...], Field(min_length=2), Tag("tuple[]")],
    Discriminator(_kind),
]


# The same with values of any kind, for keys of a method.
RowNumbers = Annotated[
    Annotated[Range, Tag("range[]")]
    | Annotated[tuple[bool | int | float | str, ...], Field(min_length=2), Tag("tuple[]")],
    Discriminator(_kind),
]
_TRIED = "values that are tried: a list, or a range {low, high, log}; not tuned by default"


class Space(Section):
    """The keys that are tuned: the learning rate and other keys of ``train``, for all methods.

    Keys that change the data, its order or the number of steps cannot be tuned.
    """

    learning_rate: RateSpace = Field(RateSpace(), description="learning rates that are tried")
    lr_scheduler_type: Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        None, description="schedulers that are tried"
    )
    warmup_steps: Numbers | None = Field(None, description=_TRIED)
    weight_decay: Numbers | None = Field(None, description=_TRIED)
    head_learning_rate: Numbers | None = Field(None, description=_TRIED)
    adam_beta1: Numbers | None = Field(None, description=_TRIED)
    adam_beta2: Numbers | None = Field(None, description=_TRIED)
    adam_epsilon: Numbers | None = Field(None, description=_TRIED)
    max_grad_norm: Numbers | None = Field(None, description=_TRIED)
    rows: dict[str, dict[str, RowNumbers]] = Field(
        {},
        description="keys of single rows, by label: of method (no size), or train.lora_plus_ratio; "
        "such as {lora: {method.rslora: [false, true]}}. Every row has the same number of trials",
    )

    def named(self) -> dict[str, Range | tuple[Any, ...]]:
        """Return the tuned keys other than the learning rate, without ``train.``."""
        found = {key: getattr(self, key) for key in type(self).model_fields}
        del found["learning_rate"], found["rows"]
        return {key: value for key, value in found.items() if value is not None}

    @model_validator(mode="after")
    def _recipes_take_it(self) -> Space:
        for key, over in self.named().items():
            values = (over.low, over.high) if isinstance(over, Range) else over
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names a value twice")
            if {"constant", "constant_with_warmup"} <= set(values):
                raise ValueError(
                    "lr_scheduler_type: 'constant' and 'constant_with_warmup' are the same "
                    "scheduler; tune warmup_steps"
                )
            if key == "warmup_steps" and isinstance(over, Range) and over.low < 1 <= over.high:
                raise ValueError(
                    "warmup_steps: a value below 1 is a share of all steps, and a value from 1 on "
                    "is a number of steps; a range must not mix the two"
                )
            for value in values:
                try:
                    TrainSection.model_validate({"warmup_steps": 0, key: value})
                except ValidationError as error:
                    what = error.errors(include_url=False)[0]["msg"]
                    raise ValueError(f"train.{key} cannot be {value!r}: {what}") from None
        return self


class Tune(Section):
    """Every method gets the same number of trials on every task before the first run."""

    trials: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="trials of each method on each task; more find better settings"
    )
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | Literal["own"] = Field(
        (TUNING_SEED,),
        description="seeds of every trial, other ones than those of the reported runs, which then "
        "share the settings found; own: every seed is tuned by itself on the rows of task.holdout, "
        "and the best trial is its reported run",
    )
    space: Space = Field(Space(), description="the keys that are tuned, for all methods")

    @property
    def own(self) -> bool:
        """Whether every seed is tuned by itself."""
        return self.seeds == "own"

    def seeds_for(self, seed: int | None) -> tuple[int, ...]:
        """Return the seeds of a series' trials.

        Args:
            seed: the seed that the series tunes; None if all seeds share it.
        """
        return (seed or 0,) if isinstance(self.seeds, str) else self.seeds

    def keys(self) -> list[str]:
        """Return the recipe keys that are tuned."""
        own = dict.fromkeys(key for keys in self.space.rows.values() for key in keys)
        return ["train.learning_rate", *(f"train.{key}" for key in self.space.named()), *own]


# --- the test


class ComparisonTest(Section):
    """How pairs of methods are tested (docs/explanation/statistics.md)."""

    over: Literal["seeds", "seeds_and_examples"] = Field(
        "seeds",
        description="seeds: what further seeds would give on the same rows; seeds_and_examples: "
        "also on further rows, by the answers to the test set of task.holdout",
    )
    row: str | None = Field(
        None,
        description="label of the row that is tested against every other; all pairs by default",
    )
    margins: dict[str, Positive] = Field(
        {},
        description="seeds_and_examples: test that row is not worse than these rows by as much, in "
        "place of a difference; 0.01 is one point",
    )


# --- the study


class Study(Section):
    """The keys of a study file."""

    name: str = Field(
        "comparison",
        max_length=80,
        pattern=r"^[\w.+-]+$",
        description="of the report and of the default folder",
    )
    recipe: str = Field(
        "configs/quickstart.yaml", description="what all runs share: a file or a shipped recipe"
    )
    methods: tuple[MethodEntry, ...] = Field(
        min_length=1, description="the rows of the comparison: names, or mappings"
    )
    tasks: tuple[TaskEntry, ...] = Field(
        (), description="names, or mappings; the recipe's own task by default"
    )
    seeds: tuple[Seed, ...] = Field(
        SEEDS[:2], min_length=1, description="every method trains once with each on each task"
    )
    match: str | None = Field(
        "trainable",
        description="trainable: as many parameters as the recipe's density selects; a budget that "
        "each method's size is solved for: trainable=70k, optimizer_state=64MiB, peak=2GiB; "
        "null or none: as each row says",
    )
    settings: dict[str, Any] = Field({}, description="recipe keys for every run")
    differ: tuple[str, ...] = Field(
        (),
        description="further recipe keys that may differ between methods; the report flags them",
    )
    tune: Tune | None = Field(None, description="tune every method before its runs")
    test: ComparisonTest = Field(ComparisonTest(), description="how pairs of methods are tested")
    engine: EngineSection = Field(EngineSection(), description="where the runs train")
    output_dir: str | None = Field(None, description="runs/<name> by default")
    figures: tuple[Figure, ...] = Field(
        (), description="published results that the report shows beside ours"
    )

    @field_validator("match", mode="before")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        if value is None or value in NOTHING:
            return None
        if not isinstance(value, str):
            what = f"expected a text, got {shorten(value)}"
            raise SettingError(what, fix="such as peak=2GiB, or trainable")
        parse_match(value)
        return value

    @property
    def budget(self) -> Budget | None:
        """The limit for every matched method, if ``match`` names an amount."""
        return parse_match(self.match) if self.match is not None else None

    @field_validator("methods", mode="before")
    @classmethod
    def _short_methods(cls, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple(row for v in value for row in _by_rate(_method_entry(v)))

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_tasks(cls, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple({"name": v} if isinstance(v, str) else v for v in value)

    @field_validator("engine", mode="before")
    @classmethod
    def _short_engine(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("test", mode="before")
    @classmethod
    def _short_test(cls, value: Any) -> Any:
        return {"over": value} if isinstance(value, str) else value

    @field_validator("tune", mode="before")
    @classmethod
    def _short_tune(cls, value: Any) -> Any:
        return {"trials": value} if isinstance(value, int) else value


def _method_entry(value: Any) -> Any:
    if isinstance(value, str):
        return {"label": value, "method": {"name": value}}
    if isinstance(value, dict):
        value = dict(value)
        if isinstance(value.get("method"), str):
            value["method"] = {"name": value["method"]}
        if "label" not in value and isinstance(value.get("method"), dict):
            value["label"] = str(value["method"].get("name", ""))
    return value


def _by_rate(entry: Any) -> list[Any]:
    """Return one row per learning rate if the entry names several."""
    if not isinstance(entry, dict) or not isinstance(entry.get("learning_rates"), tuple):
        return [entry]
    rest = {key: value for key, value in entry.items() if key != "learning_rates"}
    train = rest.get("train") or {}
    if not isinstance(train, dict):
        return [rest]
    return [
        {
            **rest,
            "label": f"{rest.get('label', '')}-{_short(rate)}",
            "train": {**train, "learning_rate": rate},
        }
        for rate in entry["learning_rates"]
    ]


def _short(rate: Any) -> str:
    """Return a short form of a rate: 5e-4 for 0.0005."""
    if not isinstance(rate, float) or not math.isfinite(rate):
        return str(rate)
    digits, exponent = f"{rate:e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
