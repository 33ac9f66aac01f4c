"""export.json: the record of an exported model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsegrad_cli.records.base import Block, Bytes, Count, Fraction, Number, Record


class ExportedModel(Block):
    """The base model of the exported run."""

    name: str
    auto_class: str | None = Field(None, description="The Auto class that loads it.")
    architecture: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    fingerprint: str | None = None


class ExportedMethod(Block):
    """The method of the exported run."""

    name: str
    form: str | None = None
    support: str | None = None
    density: Number = None


class ExportedTarget(Block):
    """How the change of one target module was exported."""

    name: str
    rank: Count | None = Field(None, description="Rank of its factors (`lora`).")
    error: Number = Field(None, description="Share of the change that is lost (`lora`).")
    rounding: Number = Field(None, description="Share of the change lost to rounding (`merged`).")
    rounding_max: Number = Field(None, description="Largest rounding error of a weight (`merged`).")


class Judged(Block):
    """The comparison that decided whether the export was written."""

    against: Literal["the run", "the cut change"]
    difference: Number
    tolerance: Number


class AnswersAlone(Block):
    """Answers that transformers generated from the folder in another process."""

    prompts: Count
    stopped: Count = Field(description="Answers that ended with a stop token.")
    tokens: Count = Field(description="Number of tokens that agree with the run's.")
    rounded: Count = Field(description="Answers that differ where two tokens are nearly tied.")


class OnPlainBase(Block):
    """The adapter on the base model before quantization."""

    difference: Number = None
    same_answers: Count | None = None


class ExportCheck(Block):
    """The exported model, loaded again, compared with the run: logits on validation rows."""

    examples: Count | None = None
    answers: Count | None = Field(None, description="Rows, or labelled tokens.")
    same_answers: Count | None = Field(None, description="Answers with the same most likely class.")
    largest_logit: Number = None
    difference: Number = Field(None, description="Largest difference between two logits.")
    judged: Judged | None = None
    answers_alone: AnswersAlone | None = None
    on_plain_base: OnPlainBase | None = None


class HubUpload(Block):
    """A commit on the Hugging Face Hub."""

    repository: str = Field(description="OWNER/NAME.")
    url: str
    public: bool
    commit: str | None = Field(None, description="Its git hash.")
    files: dict[str, Bytes] = Field({}, description="What was uploaded, with sizes.")


class ExportRecord(Record):
    """The record of `export`, beside the exported files."""

    to: Literal["merged", "lora", "adapter"]
    created: str | None = Field(None, description="ISO 8601, UTC.")
    run: str | None = Field(None, description="The run's folder.")
    source: str | None = Field(None, description="`adapter`, or the checkpoint that was exported.")
    model: ExportedModel
    method: ExportedMethod | None = None
    scope: str | None = None
    versions: dict[str, str | None] = {}
    dtype: str | None = Field(None, description="Dtype of the merged weights.")
    rounding: Number = Field(None, description="Share of the whole change lost to rounding.")
    dequantized: Count | None = Field(None, description="Number of layers that were dequantized.")
    rank: Count | None = Field(None, description="Rank of all factors; some are padded with zeros.")
    truncated: bool | None = Field(None, description="Whether the change has a higher rank.")
    error: Number = Field(None, description="Share of the whole change that is lost.")
    targets: list[ExportedTarget] = []
    modules: list[str] = Field([], description="Modules that are saved whole.")
    fresh: list[str] = Field([], description="Parameters initialized from the seed (`adapter`).")
    bases_bytes: Bytes | None = None
    labels: list[str] = Field([], description="Labels of a classifier by number.")
    problem_type: str | None = Field(None, description="Of a classifier, in transformers' words.")
    label_threshold: Fraction = Field(
        None, description="The probability from which one of several labels is given."
    )
    check: ExportCheck | None = None
    files: dict[str, Bytes] = {}
    bytes: Bytes | None = Field(None, description="Size of all files.")
    load: str | None = Field(None, description="The Python expression that loads it.")
    notes: list[str] = []
    pipeline: str | None = Field(
        None, description="The line of Python that makes a pipeline of transformers."
    )
    output_dir: str | None = Field(None, description="Only in the output of the command.")
    hub: HubUpload | None = Field(
        None, description="What was pushed. Only in the output of the command."
    )
