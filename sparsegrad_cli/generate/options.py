"""The options of ``sparsegrad generate``, and its errors. Imports no torch."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.generate.questions import Question, read_questions


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        system: System prompt; None uses that of the chat template.
        max_new_tokens: Largest number of tokens of one answer.
        temperature: 0 always takes the most likely token.
        top_p: Sample from the most likely tokens that hold this probability; 1 samples from all.
        seed: Random seed for sampling.

    Raises:
        UsageError: A value is out of range.
    """

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "--max-new-tokens": (self.max_new_tokens >= 1, "at least 1", self.max_new_tokens),
            "--temperature": (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "a number of at least 0",
                self.temperature,
            ),
            "--top-p": (0 < self.top_p <= 1, "above 0 and at most 1", self.top_p),
            "--seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1", self.seed),
        }
        for option, (holds, expected, given) in ranges.items():
            if not holds:
                raise UsageError(f"expected {expected}, got {given}", where=option)

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy, without sampling."""
        return self.temperature == 0

    def record(self) -> dict[str, Any]:
        """Return the settings that affect an answer: top_p and seed only if tokens are sampled."""
        return {
            "system": self.system,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": None if self.greedy else self.top_p,
            "seed": None if self.greedy else self.seed,
        }


@dataclass(frozen=True)
class ModelOptions:
    """The model that answers.

    Attributes:
        source: A run's folder, an exported folder, a model's folder, a hub id or a built-in.
        overrides: For a run: ``key.path=value`` for files that have moved since.
        device: A device of torch; None uses a GPU if there is one.
        dtype: The dtype of the weights; None uses that of the model's files. A run has its own.
    """

    source: str
    overrides: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """The options of one call with questions.

    Attributes:
        model: The model that answers.
        settings: How it answers.
        questions: See :func:`sparsegrad_cli.generate.questions.read_questions`; None with
            ``prompt``.
        prompt: A single question.
        batch_size: Questions per batch.
        output: File to which answers are added. With None, answers to a prompt are not written, and
            others are written to runs/answers/.
    """

    model: ModelOptions
    settings: GenerationSettings
    questions: str | None = None
    prompt: str | None = None
    batch_size: int = 4
    output: Path | None = None

    def read_questions(self) -> list[Question]:
        """Return the prompt, or the questions of the file; see :func:`read_questions`."""
        if self.prompt is not None:
            return [Question(1, None, (self.prompt,))]
        return read_questions(self.questions or "")


def generation_errors() -> AbstractContextManager[None]:
    """Turn Ctrl-C and failed allocations into errors that name this command's settings."""
    return mapped_errors(
        again="the same command continues where it stopped",
        memory=("--batch-size", "a smaller batch, fewer --max-new-tokens, or --device cpu"),
    )
