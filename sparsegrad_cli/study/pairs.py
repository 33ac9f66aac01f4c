"""Test which methods differ: all pairs of methods over all seeds and tasks, with correction.

A pair of methods is compared on the (task, seed) runs that both have finished: same data, same
order, same head. Tasks have scores of different kinds and scales, so each difference is divided by
the root mean square of its task's differences, which does not change with their signs. It is
negated if lower scores are better. The primary test flips signs: if the methods did not differ,
each of them would be equally likely to get either score of a pair. It is exact for any number of
pairs and assumes no distribution; its result holds for these tasks. If the tasks' scores are of one
kind, the record also has Student's t on the plain differences; its confidence interval shows how
large a difference may be.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from sparsegrad_cli.records.metric_direction import common_metric, scale_of
from sparsegrad_cli.records.study import CellEntry, PairTest, PairTestsBlock
from sparsegrad_cli.study.rows import score_of
from sparsegrad_cli.study.statistics import (
    LEVEL,
    Student,
    holm,
    mean,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    student,
)

TEST = (
    "sign-flip permutation test over (task, seed) cells, two-sided, differences divided by their "
    "task's root mean square"
)
CHECK = "paired t-test over seeds, tasks as strata, two-sided, corrected in the same way"
_MIN_SEEDS = 2

Scores = dict[tuple[str, int], float]


def pair_tests(cells: Sequence[CellEntry], row: str | None = None) -> PairTestsBlock:
    """Return the ``tests`` block of compare.json, of the test over seeds.

    A task counts for a pair that shares at least two seeds of it: one seed cannot rank methods.

    Args:
        cells: the runs.
        row: the label of the row that is tested against every other; None tests all pairs.
    """
    scores: dict[str, Scores] = {}
    metrics: dict[str, str | None] = {}
    for cell in cells:
        kept = scores.setdefault(cell.method, {})
        score = score_of(cell)
        if score is not None and cell.run is not None:
            kept[cell.task, cell.seed] = score
            metrics.setdefault(cell.task, cell.run.task.metric if cell.run.task else None)
    found = [_pair(a, b, scores[a], scores[b], metrics) for a, b in pairs_of(list(scores), row)]
    pairs = [pair for pair in found if pair is not None]
    adjusted = holm([pair.p for pair in pairs])
    tested = [pair.t.p for pair in pairs if pair.t is not None]
    adjusted_t = iter(holm(tested))
    return PairTestsBlock(
        row=row,
        test=TEST,
        check=CHECK,
        correction=holm_words(len(pairs)),
        level=LEVEL,
        untested=len(found) - len(pairs),
        pairs=[
            pair.block(p_holm, next(adjusted_t) if pair.t is not None else None, len(pairs))
            for pair, p_holm in zip(pairs, adjusted, strict=True)
        ],
    )


def common_seeds(
    ours: Iterable[tuple[str, int]], theirs: Container[tuple[str, int]]
) -> dict[str, list[int]]:
    """Return task -> the seeds that both methods have finished, where these are two or more.

    Args:
        ours, theirs: the (task, seed) runs of each method.
    """
    seeds: dict[str, list[int]] = {}
    for task, seed in ours:
        if (task, seed) in theirs:
            seeds.setdefault(task, []).append(seed)
    return {task: common for task, common in seeds.items() if len(common) >= _MIN_SEEDS}


def holm_words(pairs: int) -> str:
    """Return how p-values are corrected: ``Holm's, over 3 pairs``."""
    return f"Holm's, over {pairs} pair{'' if pairs == 1 else 's'}"


def pairs_of(labels: Sequence[str], row: str | None) -> list[tuple[str, str]]:
    """Return the pairs that are tested: all, or ``row`` with every other."""
    if row is None:
        return list(combinations(labels, 2))
    return [(row, label) for label in labels if label != row] if row in labels else []


@dataclass(frozen=True)
class _Pair:
    """Two methods on the tasks on which they share at least two seeds.

    Attributes:
        a, b: the methods.
        by_task: differences a - b of each task.
        seeds: number of distinct seeds that they share.
        metric: the metric of all tasks; None if their scores are of different kinds.
        standardised: by task, the differences divided by their root mean square; higher is better.
    """

    a: str
    b: str
    by_task: Mapping[str, Sequence[float]]
    seeds: int
    metric: str | None
    standardised: Sequence[Sequence[float]]

    @cached_property
    def values(self) -> list[float]:
        """All standardised differences."""
        return [value for differences in self.standardised for value in differences]

    @cached_property
    def p(self) -> float:
        """The p-value of the primary test."""
        return sign_flip_p(self.values)

    @cached_property
    def t(self) -> Student | None:
        """The paired t-test; None if the tasks' scores are of different kinds."""
        return student(list(self.by_task.values())) if self.metric else None

    def block(self, p_holm: float, p_t_holm: float | None, tests: int) -> PairTest:
        """Return the pair's block of compare.json.

        Args:
            p_holm, p_t_holm: its corrected p-values.
            tests: number of pairs that are tested together.
        """
        total = math.fsum(self.values)
        shown = p_holm <= LEVEL
        needed = None if shown else seeds_needed(self.standardised, tests)
        means = [mean(differences) or 0.0 for differences in self.by_task.values()]
        return PairTest(
            a=self.a,
            b=self.b,
            n=len(self.values),
            tasks=len(self.by_task),
            seeds=self.seeds,
            metric=self.metric,
            wins=sum(value > 0 for value in self.values),
            losses=sum(value < 0 for value in self.values),
            mean=mean(means) if self.metric else None,
            interval=[self.t.low, self.t.high] if self.t else None,
            p=self.p,
            p_holm=p_holm,
            p_t=self.t.p if self.t else None,
            p_t_holm=p_t_holm,
            smallest_p=smallest_p(self.values),
            seeds_needed=None if needed is None else max(needed, self.seeds + 1),
            better=(self.a if total > 0 else self.b) if shown else None,
        )


def _pair(
    a: str, b: str, ours: Scores, theirs: Scores, metrics: Mapping[str, str | None]
) -> _Pair | None:
    """Return a pair; None if the methods do not share two seeds of any task."""
    seeds = common_seeds(ours, theirs)
    if not seeds:
        return None
    by_task = {t: [ours[t, s] - theirs[t, s] for s in common] for t, common in seeds.items()}
    standardised = [
        _standardised(differences, scale_of(metrics[task]).lower_is_better)
        for task, differences in by_task.items()
    ]
    metric = common_metric([metrics[task] for task in by_task])
    return _Pair(a, b, by_task, len(set().union(*seeds.values())), metric, standardised)


def _standardised(differences: Sequence[float], lower_is_better: bool) -> list[float]:
    """Divide differences by their root mean square; higher is better. All zeros stay zeros."""
    size = math.sqrt(math.fsum(d * d for d in differences) / len(differences))
    sign = -1.0 if lower_is_better else 1.0
    return [sign * d / size if size else 0.0 for d in differences]
