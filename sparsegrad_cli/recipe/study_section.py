"""Define the keys of a study file. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sparsegrad_cli.recipe.budget import NOTHING, Budget, MisspeltError, parse_match
from sparsegrad_cli.recipe.section import NonNegativeInt, PositiveInt, Section, Seed
from sparsegrad_cli.recipe.tuning import Tune
from sparsegrad_cli.recipe.yaml_source import shorten

Positive = Annotated[float, Field(gt=0)]
# The paper's seeds first, then a plain sequence.
SEEDS = (42, 3705, 2023, 1, 2, 3, 4, 5, 6, 7)


class MethodEntry(Section):
    """One row of the comparison: a method, and its changes to the recipe.

    ``lora`` alone is short for ``{label: lora, method: {name: lora}}``; an entry with
    ``learning_rates: [1e-3, 2e-3]`` is short for two rows, ``lora-1e-3`` and ``lora-2e-3``.
    """

    label: str = Field(min_length=1, max_length=80, pattern=r"^[\w.+-]+$")
    method: dict[str, Any]
    train: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    matched: bool = Field(
        True, description="false: runs as the recipe says, outside of what the others are held to"
    )


class TaskEntry(Section):
    """One task: its name, and its changes to the recipe (``task``, ``train``).

    ``methods`` maps a method's label to the method's ``train`` settings on this task, such as a
    learning rate that was tuned there.
    """

    name: str
    task: dict[str, Any] = {}
    train: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class Figure(Section):
    """Published results of a method on a task, which the report shows next to ours."""

    source: str
    task: str = Field(description="a task of the study, or `average` over all of them")
    method: str
    score: float | None = Field(None, description="a fraction: 0.688 for 68.8; a loss as it is")
    std: float | None = None
    steps_per_s: Positive | None = None
    peak_mb: Positive | None = Field(None, description="megabytes of 1,000,000 bytes")
    learning_rate: Positive | None = Field(None, description="that was found by tuning")

    @model_validator(mode="after")
    def _says_something(self) -> Figure:
        if all(v is None for v in (self.score, self.steps_per_s, self.peak_mb, self.learning_rate)):
            raise ValueError("give score, steps_per_s, peak_mb or learning_rate")
        if self.std is not None and self.score is None:
            raise ValueError("std is the score's, and there is no score")
        return self


class SlurmSettings(Section):
    """How runs are submitted to Slurm. The names are those of submitit."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: PositiveInt = Field(
        240, description="time limit of a job; a run that reaches it saves and is queued again"
    )
    gpus_per_node: NonNegativeInt | None = None
    cpus_per_task: PositiveInt | None = None
    mem_gb: Positive | None = None
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
        None, description="of a cluster, or auto; by default RAY_ADDRESS, else this machine alone"
    )
    num_cpus: Positive = Field(1.0, description="CPUs that a run reserves")
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs that a run reserves; by default one where the cluster has any"
    )


class EngineSection(Section):
    """Where the runs of a study train."""

    name: Literal["local", "slurm", "ray"] = "local"
    jobs: PositiveInt | None = Field(
        None, description="runs at once; by default 1 for local and 32 for a cluster"
    )
    slurm: SlurmSettings = SlurmSettings()
    ray: RaySettings = RaySettings()


class Study(Section):
    """The keys of a study file."""

    name: str = Field("comparison", max_length=80, pattern=r"^[\w.+-]+$")
    recipe: str = "configs/quickstart.yaml"
    methods: tuple[MethodEntry, ...] = Field(min_length=1)
    tasks: tuple[TaskEntry, ...] = ()
    seeds: tuple[Seed, ...] = Field(SEEDS[:2], min_length=1)
    match: str | None = Field(
        "trainable",
        description="trainable: as many entries as the recipe's density says; a budget that each "
        "method's size is solved for: trainable=70k, optimizer_state=64MiB, peak=2GiB; "
        "null or none: as each row says",
    )
    settings: dict[str, Any] = Field({}, description="recipe keys for every cell")
    differ: tuple[str, ...] = Field(
        (),
        description="recipe keys that may differ between methods, beside method, calibration and "
        "learning rate; the report flags them",
    )
    tune: Tune | None = Field(None, description="tune every method alike before its cells run")
    engine: EngineSection = Field(EngineSection(), description="where the runs train")
    output_dir: str | None = None
    figures: tuple[Figure, ...] = ()

    @field_validator("match", mode="before")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        if value is None or value in NOTHING:
            return None
        if not isinstance(value, str):
            raise MisspeltError(f"{shorten(value)} is no text", "such as peak=2GiB, or trainable")
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
