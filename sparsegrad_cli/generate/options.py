"""What the command line asks of ``sparsegrad generate``. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import UsageError


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are drawn.

    Attributes:
        system: what the assistant is told first; None leaves it to the chat template.
        max_new_tokens: of one answer.
        temperature: 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that hold this share; 1 draws from all.
        seed: of the drawing.

    Raises:
        UsageError: a value that cannot be.
    """

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        good = {
            "--max-new-tokens": self.max_new_tokens >= 1,
            "--temperature": math.isfinite(self.temperature) and self.temperature >= 0,
            "--top-p": 0 < self.top_p <= 1,
            "--seed": 0 <= self.seed < 2**63,
        }
        wrong = next((name for name, holds in good.items() if not holds), None)
        if wrong is not None:
            raise UsageError("the value is out of range", where=wrong)

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0

    def record(self) -> dict[str, Any]:
        """All that an answer depends on: what is drawn only where something is."""
        return {
            "system": self.system,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": None if self.greedy else self.top_p,
            "seed": None if self.greedy else self.seed,
        }


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it computes.

    Attributes:
        source: a run's folder, an exported one, a model's folder, a hub id or a built-in.
        overrides: for a run: ``key.path=value`` of what lies elsewhere now.
        device: as torch names it; None takes a GPU if there is one.
        dtype: of a model's weights; None takes that of its files. A run has its own.
    """

    source: str
    overrides: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """One call with questions.

    Attributes:
        model: who answers.
        settings: how.
        questions: as :func:`sparsegrad_cli.generate.questions.read_questions` takes it; or
        prompt: one question, instead.
        batch_size: questions at a time.
        output: file of the answers, which grows; None keeps those of a prompt in no file, and
            others under runs/answers/.
    """

    model: ModelOptions
    settings: GenerationSettings
    questions: str | None = None
    prompt: str | None = None
    batch_size: int = 4
    output: Path | None = None
