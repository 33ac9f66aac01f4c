"""evaluation.json: how good a trained classifier is on the rows of a file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsegrad_cli.records.base import Block, Count, Fraction, Interval, Number, Record


class MetricValue(Block):
    """The value of one metric."""

    value: Number
    interval: Interval | None = Field(None, description="95 % confidence interval.")
    interval_by: Literal["wilson", "bootstrap"] = Field(
        "bootstrap",
        description="wilson: Wilson's score interval of a share of the rows; bootstrap: "
        "percentiles of a bootstrap over rows.",
    )


class ClassScores(Block):
    """How well one class, or one of several labels, was found."""

    name: str
    rows: Count = Field(description="Rows with this label.")
    predicted: Count = Field(description="Rows with this prediction.")
    precision: Fraction = None
    recall: Fraction = None
    f1: Fraction = None
    average_precision: Fraction = Field(
        None, description="Of one of several labels, whatever the threshold."
    )


class WrongExample(Block):
    """One row that the model gets wrong, or far from its score."""

    place: str = Field(description="File and line, or row.")
    texts: list[str]
    label: str = Field(description="Several labels are separated by commas.")
    prediction: str
    loss: Number = Field(
        description="Cross-entropy in nats (of several labels, their mean), or squared error."
    )


class EvaluationRecord(Record):
    """The record of `evaluate`."""

    model: str = Field(description="The run or model, as named on the command line.")
    about: str = Field(description="What was loaded.")
    file: str
    rows: Count
    cut: Count = Field(description="Rows that were longer than the model reads.")
    loss: Number = Field(None, description="Mean cross-entropy in nats, or mean squared error.")
    metrics: dict[str, MetricValue]
    resamples: Count = Field(description="Of the bootstrap; 0 for no intervals.")
    seed: Count = 0
    threshold: Fraction = Field(
        None, description="The probability from which the model gives one of several labels."
    )
    classes: list[ClassScores] = []
    confusion: list[list[Count]] = Field(
        [],
        description="Rows by label (rows) and prediction (columns), in the order of `classes`; "
        "empty for several labels a row.",
    )
    worst: list[WrongExample] = Field([], description="The rows with the highest loss, first.")
    notes: list[str] = []
    output_dir: str | None = None
