"""How metrics are shown, and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scale:
    """One metric's scale.

    Attributes:
        words: the name of the metric for readers.
        times: the factor of printed values; fractions are shown times 100.
        digits: the number of decimals.
        lower_is_better: true for losses and perplexities.
        low, high: the smallest and the largest value that the metric can have.
    """

    words: str
    times: int = 100
    digits: int = 1
    lower_is_better: bool = False
    low: float = -math.inf
    high: float = math.inf

    @property
    def label(self) -> str:
        """Return ``accuracy ×100`` or ``validation loss``."""
        return f"{self.words} ×{self.times}" if self.times != 1 else self.words

    @property
    def column(self) -> str:
        """Return ``score ×100`` for fractions, and the metric's own name for others."""
        return "score ×100" if self.times == 100 else self.words

    def best(self, values: Iterable[float]) -> float:
        """Return the best of at least one value."""
        return min(values) if self.lower_is_better else max(values)

    def clip(self, interval: Sequence[float] | None) -> list[float] | None:
        """Cut an interval of scores at the ends of the metric's range."""
        return _cut(interval, self.low, self.high)

    def clip_difference(self, interval: Sequence[float] | None) -> list[float] | None:
        """Cut an interval of differences of two scores at the largest possible difference."""
        return _cut(interval, self.low - self.high, self.high - self.low)


def _cut(interval: Sequence[float] | None, low: float, high: float) -> list[float] | None:
    return None if interval is None else [min(max(end, low), high) for end in interval]


def _share(words: str) -> Scale:
    """Return the scale of a metric from 0 to 1."""
    return Scale(words, low=0.0, high=1.0)


def _correlation(words: str) -> Scale:
    """Return the scale of a metric from -1 to 1."""
    return Scale(words, low=-1.0, high=1.0)


METRICS = {
    "matthews_correlation": _correlation("Matthews correlation"),
    "pearson": _correlation("Pearson correlation"),
    "spearmanr": _correlation("Spearman correlation"),
    "pearson_spearman": _correlation("mean of Pearson and Spearman correlation"),
    "f1": _share("F1"),
    "f1_micro": _share("micro F1"),
    "exact_match": _share("exact match"),
    "average_precision": _share("average precision"),
    "f1_macro": _share("F1, mean over classes"),
    "f1_weighted": _share("F1, mean over classes weighted by rows"),
    "precision": _share("precision"),
    "precision_macro": _share("precision, mean over classes"),
    "precision_weighted": _share("precision, mean over classes weighted by rows"),
    "recall": _share("recall"),
    "recall_macro": _share("recall, mean over classes"),
    "recall_weighted": _share("recall, mean over classes weighted by rows"),
    "accuracy": _share("accuracy"),
    "loss": Scale("validation loss", times=1, digits=3, lower_is_better=True, low=0.0),
    "perplexity": Scale("perplexity", times=1, digits=2, lower_is_better=True, low=1.0),
    "token_accuracy": _share("next-token accuracy"),
}
SCORE = Scale("score")
_OF_ONE_CLASS = ("f1", "precision", "recall")


def scale_of(metric: str | None, positive_label: str | None = None) -> Scale:
    """Return the scale of a metric; an unknown metric is shown as a fraction.

    Args:
        metric: its name in a record.
        positive_label: the class that ``f1``, ``precision`` and ``recall`` refer to. The words of
            these metrics include it.
    """
    if metric is None:
        return SCORE
    scale = METRICS.get(metric) or Scale(metric.replace("_", " "))
    if metric in _OF_ONE_CLASS and positive_label is not None:
        shown = positive_label if len(positive_label) <= 40 else f"{positive_label[:37]}..."
        return replace(scale, words=f"{scale.words} of class {shown}")
    return scale


def common_metric(metrics: Sequence[str | None]) -> str | None:
    """Return the metric of a mean over tasks, or None if their scores cannot be averaged.

    Several metrics are averaged as a ``score`` if all are fractions, as GLUE does.
    """
    if len(set(metrics)) == 1:
        return metrics[0] or "score"
    shares = all(scale_of(name).times == SCORE.times for name in metrics)
    return "score" if metrics and shares else None


def set_metric(name: str, metric: str) -> str:
    """Return the name of a metric on one validation set: ``ood_accuracy``."""
    return f"{name.replace(' ', '_')}_{metric}"
