"""Published figures that a study sets beside its own. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sparsegrad_cli.recipe.section import Section

Positive = Annotated[float, Field(gt=0)]


class Figure(Section):
    """What was published of a method on a task, set beside ours: one figure or several."""

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
