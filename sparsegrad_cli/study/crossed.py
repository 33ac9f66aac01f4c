"""Test two methods over seeds and examples at once: both are samples, and both are shared.

All runs of a task are measured on the same test rows, and the runs of one seed share head, order
and calibration sample. A test over seeds alone says what other seeds would give on these rows; this
one says what other seeds would give on other rows of the kind. It is the method of Dorfman, Berbaum
and Metz (1992, Investigative Radiology 27) for several readers of the same cases, with the degrees
of freedom of Hillis (2007, Statistics in Medicine 26): jackknife pseudovalues of the score, in a
two-way layout of seeds and rows, both random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsegrad_cli.data.metrics import metric_values
from sparsegrad_cli.recipe.tasks import TaskSpec
from sparsegrad_cli.study.statistics import LEVEL, ROUNDING

_Floats = npt.NDArray[np.float64]


class Layout(NamedTuple):
    """The two-way layout of one task: mean squares of the differences between two methods.

    Attributes:
        mean: mean difference of the scores.
        seeds, rows: numbers of seeds (S) and of test rows (N).
        ms_seeds: mean square of the seeds, S - 1 degrees of freedom.
        ms_rows: mean square of the rows, N - 1.
        ms_rest: mean square of the interaction, (S - 1) (N - 1).
    """

    mean: float
    seeds: int
    rows: int
    ms_seeds: float
    ms_rows: float
    ms_rest: float

    @property
    def of_rows(self) -> float:
        """Variance of the mean because of the rows: max(ms_rows - ms_rest, 0) / (S N)."""
        return max(self.ms_rows - self.ms_rest, 0.0) / (self.seeds * self.rows)

    @property
    def of_seeds(self) -> float:
        """Variance of the mean because of the seeds, with the interaction: ms_seeds / (S N)."""
        return self.ms_seeds / (self.seeds * self.rows)


class Crossed(NamedTuple):
    """The test of a mean difference over tasks.

    Attributes:
        mean: mean over tasks of the mean difference.
        error: its standard error.
        freedom: degrees of freedom of Student's t.
        rows_share: share of the variance that is due to the rows, which more seeds do not reduce.
    """

    mean: float
    error: float
    freedom: float
    rows_share: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the confidence interval that covers 1 - level."""
        from scipy import stats

        half = float(stats.t.ppf(1 - level / 2, self.freedom)) * self.error
        return self.mean - half, self.mean + half

    def p(self, least: float | None = None) -> float:
        """Return the p-value of no difference, two-sided.

        Args:
            least: in place of that, of the one-sided hypothesis that the difference is at most
                ``least``, such as -0.01: its rejection shows that it is larger (non-inferiority).
        """
        from scipy import stats

        if least is None:
            return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))
        return float(stats.t.sf((self.mean - least) / self.error, self.freedom))


def pseudo_values(spec: TaskSpec, labels: npt.ArrayLike, predictions: npt.ArrayLike) -> _Floats:
    """Return the jackknife pseudovalue of each row for the task's metric, shape (N,).

    N s - (N - 1) s_i, where s is the score and s_i the score without row i; for accuracy it is 1
    for a right answer and 0 for a wrong one. Their mean is the score up to its jackknife bias,
    which :func:`layout` removes.

    Args:
        spec: the task, whose metric is a function of labels and predictions.
        labels, predictions: class ids or scores, N of each.
    """
    true, given = np.asarray(labels), np.asarray(predictions)
    count = len(true)
    score = _score(spec, given, true)
    without: dict[tuple[Any, Any], float] = {}
    values = np.empty(count)
    for row in range(count):
        pair = (true[row], given[row])
        if spec.regression or pair not in without:  # Equal pairs of classes are interchangeable.
            kept = np.arange(count) != row
            without[pair] = _score(spec, given[kept], true[kept])
        values[row] = count * score - (count - 1) * without[pair]
    return values


def _score(spec: TaskSpec, predictions: Any, labels: Any) -> float:
    return float(metric_values(spec, predictions, labels).values[spec.metric])


def layout(differences_SN: npt.ArrayLike, means_S: npt.ArrayLike) -> Layout:
    """Return the two-way layout of a task.

    Args:
        differences_SN: differences of the two methods' pseudovalues, (seeds, rows).
        means_S: differences of the two methods' scores, (seeds,). The pseudovalues of each seed are
            moved to this mean, which removes their jackknife bias.

    Raises:
        ValueError: there are fewer than two seeds or rows.
    """
    means = np.asarray(means_S, dtype=np.float64)
    values = np.asarray(differences_SN, dtype=np.float64)
    seeds, rows = values.shape
    if seeds < 2 or rows < 2:
        raise ValueError(f"expected two seeds and two rows or more, got {seeds} and {rows}")
    values = values - values.mean(axis=1, keepdims=True) + means[:, None]
    mean = float(values.mean())
    by_seed, by_row = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_row[None, :] + mean
    return Layout(
        mean,
        seeds,
        rows,
        ms_seeds=rows * float(((by_seed - mean) ** 2).sum()) / (seeds - 1),
        ms_rows=seeds * float(((by_row - mean) ** 2).sum()) / (rows - 1),
        ms_rest=float((rest**2).sum()) / ((seeds - 1) * (rows - 1)),
    )


def crossed(layouts: Sequence[Layout]) -> Crossed | None:
    """Return the test of the mean over tasks, which are fixed; None if nothing varies.

    The variance of a task's mean is (ms_seeds + max(ms_rows - ms_rest, 0)) / (S N). That of the
    mean over G tasks is their sum divided by G^2. The degrees of freedom are Satterthwaite's, where
    only the mean squares of the seeds are uncertain (Hillis 2007, equation 7, for one task).
    """
    if not layouts:
        return None
    count = len(layouts)
    of_seeds = [each.of_seeds / count**2 for each in layouts]
    of_rows = [each.of_rows / count**2 for each in layouts]
    variance = math.fsum(of_seeds) + math.fsum(of_rows)
    mean = math.fsum(each.mean for each in layouts) / count
    error = math.sqrt(variance)
    uncertain = math.fsum(
        part**2 / (each.seeds - 1) for part, each in zip(of_seeds, layouts, strict=True)
    )
    if error <= ROUNDING or uncertain == 0:
        return None
    return Crossed(mean, error, variance**2 / uncertain, math.fsum(of_rows) / variance)
