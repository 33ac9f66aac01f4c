"""How a metric is read: its words, the factor it is printed with, which direction is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scale:
    """One metric's scale.

    Attributes:
        words: the metric as a reader knows it.
        times: what a value is multiplied by before it is printed; fractions are shown times 100.
        digits: decimals after that.
        lower_is_better: losses and perplexities.
    """

    words: str
    times: int = 100
    digits: int = 1
    lower_is_better: bool = False

    @property
    def label(self) -> str:
        """``accuracy ×100``; ``validation loss``."""
        return f"{self.words} ×{self.times}" if self.times != 1 else self.words

    @property
    def column(self) -> str:
        """``score ×100`` for what is a share of right answers; else the metric's own name."""
        return "score ×100" if self.times == 100 else self.words

    def best(self, values: Iterable[float]) -> float:
        """The best of some values, at least one."""
        return min(values) if self.lower_is_better else max(values)


METRICS = {
    "matthews_correlation": Scale("Matthews correlation"),
    "pearson": Scale("Pearson correlation"),
    "spearmanr": Scale("Spearman correlation"),
    "pearson_spearman": Scale("mean of Pearson and Spearman correlation"),
    "f1": Scale("F1"),
    "f1_macro": Scale("F1, mean over classes"),
    "f1_weighted": Scale("F1, mean over classes weighted by rows"),
    "precision": Scale("precision"),
    "precision_macro": Scale("precision, mean over classes"),
    "precision_weighted": Scale("precision, mean over classes weighted by rows"),
    "recall": Scale("recall"),
    "recall_macro": Scale("recall, mean over classes"),
    "recall_weighted": Scale("recall, mean over classes weighted by rows"),
    "accuracy": Scale("accuracy"),
    "loss": Scale("validation loss", times=1, digits=3, lower_is_better=True),
    "perplexity": Scale("perplexity", times=1, digits=2, lower_is_better=True),
    "token_accuracy": Scale("next-token accuracy"),
}
SCORE = Scale("score")
_OF_ONE_CLASS = ("f1", "precision", "recall")


def scale_of(metric: str | None, positive_label: str | None = None) -> Scale:
    """The scale of a metric; one this version does not know is read as a fraction.

    Args:
        metric: its name in a record.
        positive_label: the class of two that ``f1``, ``precision`` and ``recall`` are of, which
            their words name.
    """
    if metric is None:
        return SCORE
    scale = METRICS.get(metric) or Scale(metric.replace("_", " "))
    if metric in _OF_ONE_CLASS and positive_label is not None:
        shown = positive_label if len(positive_label) <= 40 else f"{positive_label[:37]}..."
        return replace(scale, words=f"{scale.words} of class {shown}")
    return scale


def common_metric(metrics: Sequence[str | None]) -> str | None:
    """The metric under which means over tasks mean something; None where there is none.

    One metric is its own; several are a ``score`` where all are shares of 1, as GLUE averages them.
    """
    if len(set(metrics)) == 1:
        return metrics[0] or "score"
    shares = all(scale_of(name).times == SCORE.times for name in metrics)
    return "score" if metrics and shares else None
