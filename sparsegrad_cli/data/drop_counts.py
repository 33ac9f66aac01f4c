"""What a reader keeps and drops, counted by reason."""

from __future__ import annotations

from collections import Counter


class Tally:
    """Counts by reason, and where each was first met.

    Attributes:
        counts: reason -> how many, in the order in which the reasons were met.
        first: reason -> the place of its first case.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Count ``count`` more cases of ``reason``."""
        self.counts[reason] += count
        self.first.setdefault(reason, place)

    def listed(self, prefix: str = "") -> dict[str, int]:
        """The counts, most first, each name with the prefix before it."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {f"{prefix}{reason}": count for reason, count in ordered}

    def sentence(self) -> str:
        """``12 deleted, 3 empty text (first: a.jsonl:7)``: the reasons in one line."""
        parts = [
            f"{count} {reason} (first: {self.first[reason]})"
            for reason, count in self.listed().items()
        ]
        return "; ".join(parts) or "nothing was dropped"
