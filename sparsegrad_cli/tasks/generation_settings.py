"""How a language model generates answers. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.errors import UsageError


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
