"""Test pairs of methods over seeds and examples, from their runs' answers to the test sets."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.recipe.study_section import ComparisonTest
from sparsegrad_cli.recipe.tasks import TaskSpec
from sparsegrad_cli.records.metric_direction import common_metric, scale_of
from sparsegrad_cli.records.run import RunRecord, TaskBlock
from sparsegrad_cli.records.study import CellEntry, PairTest, PairTestsBlock
from sparsegrad_cli.run.test_answers import TEST, Answer, read_answers
from sparsegrad_cli.study.crossed import Crossed, Layout, crossed, layout, pseudo_values
from sparsegrad_cli.study.pairs import common_seeds, holm_words, pairs_of
from sparsegrad_cli.study.rows import score_of
from sparsegrad_cli.study.statistics import LEVEL, MOST_SEEDS, POWER, ROUNDING, holm

TEST_WORDS = (
    "Student's t over seeds and test rows, both drawn at random (Dorfman, Berbaum and Metz 1992; "
    "degrees of freedom of Hillis 2007), two-sided, plain mean over tasks"
)
_CHECK = "none: this test has an interval of its own"

_Floats = npt.NDArray[np.float64]


class _Run(NamedTuple):
    """A finished run: its score on the test set, and the pseudovalue of each of its rows."""

    score: float
    values: _Floats


def crossed_tests(cells: Sequence[CellEntry], test: ComparisonTest, folder: Path) -> PairTestsBlock:
    """Return the ``tests`` block of compare.json, of the test over seeds and examples.

    Holm's correction is over all pairs, those with a margin among them.

    No pair is tested if the answers of a finished run are missing, damaged, or of other rows than
    those of the runs beside it; the block then says why.

    Args:
        cells: the runs.
        test: which pairs, and which margins.
        folder: the study's folder.
    """
    asked = pairs_of(list(dict.fromkeys(cell.method for cell in cells)), test.row)
    block = PairTestsBlock(
        over=test.over,
        row=test.row,
        margins=dict(test.margins),
        test=TEST_WORDS,
        check=_CHECK,
        correction="",
        level=LEVEL,
    )
    try:
        found = _pairs(cells, test, folder, asked)
    except FileFormatError as error:
        return block.changed(untested=len(asked), reason=f"{error.what} ({error.where})")
    pairs = [pair for pair in found if pair is not None]
    adjusted = holm([pair.p for pair in pairs])
    return block.changed(
        correction=holm_words(len(pairs)),
        untested=len(found) - len(pairs),
        pairs=[
            pair.block(p_holm, len(pairs)) for pair, p_holm in zip(pairs, adjusted, strict=True)
        ],
    )


def _pairs(
    cells: Sequence[CellEntry],
    test: ComparisonTest,
    folder: Path,
    asked: Sequence[tuple[str, str]],
) -> list[_Pair | None]:
    """Return the pairs that are asked for; errors as :func:`_read` and :func:`_pair`."""
    runs: dict[str, dict[tuple[str, int], _Run]] = {}
    metrics: dict[str, str | None] = {}
    for cell in cells:
        mine = runs.setdefault(cell.method, {})
        if score_of(cell) is not None and cell.run is not None and cell.run_dir is not None:
            mine[cell.task, cell.seed] = _read(cell.run, folder / cell.run_dir)
            metrics.setdefault(cell.task, cell.run.task.metric if cell.run.task else None)
    return [_pair(a, b, runs[a], runs[b], metrics, test.margins.get(b)) for a, b in asked]


def _read(run: RunRecord, folder: Path) -> _Run:
    """Return the score and the pseudovalues of a run, on the first of its test sets.

    Raises:
        FileFormatError: the answers are missing or damaged.
    """
    path, task = folder / TEST, run.task or TaskBlock()
    test = run.metrics.test if run.metrics else None
    assert test is not None and test.score is not None  # A study with this test has task.holdout.
    spec = TaskSpec(
        name=task.name or "",
        text_columns=("text",),
        label_column="label",
        label_names=tuple(task.label_names) if task.label_names else None,
        regression=task.regression,
        metric=task.metric or "",
        metrics=(task.metric or "",),
        chosen_positive=task.positive_label,
    )
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    values = _values(spec, folder, changed)
    expected = next(iter(task.test_examples.values()), 0)
    if len(values) != expected:
        what = f"expected {expected} answers, found {len(values)}"
        raise FileFormatError(what, where=str(path), fix="train the run again")
    return _Run(test.score, values)


@functools.lru_cache(maxsize=4096)
def _values(spec: TaskSpec, folder: Path, changed: int) -> _Floats:
    """Return the pseudovalues of a run's answers; ``changed`` is the time of the file."""
    answers: Sequence[Answer] = next(iter(read_answers(folder).values()), ())
    labels: list[Any] = [answer.label for answer in answers]
    return pseudo_values(spec, labels, [answer.prediction for answer in answers])


@dataclass(frozen=True)
class _Pair:
    """Two methods on the tasks on which they share at least two seeds.

    Attributes:
        a, b: the methods.
        layouts: of each task; differences are positive where ``a`` is better.
        found: the test over all tasks; None if nothing varies.
        seeds: number of distinct seeds that they share.
        metric: the metric of the mean; None if the tasks' scores cannot be averaged.
        signs: sign of each paired run's difference.
        margin: of non-inferiority; None for a test of a difference.
    """

    a: str
    b: str
    layouts: Sequence[Layout]
    found: Crossed | None
    seeds: int
    metric: str | None
    signs: Sequence[float]
    margin: float | None

    @property
    def p(self) -> float:
        """The p-value, two-sided; for a margin, twice that of the one-sided test."""
        if self.found is None:
            return 1.0
        if self.margin is None:
            return self.found.p()
        return min(1.0, 2 * self.found.p(least=-self.margin))

    def block(self, p_holm: float, tests: int) -> PairTest:
        """Return the pair's block of compare.json.

        Args:
            p_holm: its corrected p-value.
            tests: number of pairs that are tested together.
        """
        found, shown = self.found, p_holm <= LEVEL
        mean = self._mean
        better = (self.a if mean > 0 else self.b) if shown and self.margin is None else None
        sign = -1.0 if scale_of(self.metric).lower_is_better else 1.0
        interval = [sign * end for end in found.interval()] if found else None
        return PairTest(
            a=self.a,
            b=self.b,
            n=len(self.signs),
            tasks=len(self.layouts),
            seeds=self.seeds,
            metric=self.metric,
            wins=sum(value > 0 for value in self.signs),
            losses=sum(value < 0 for value in self.signs),
            mean=sign * mean if self.metric else None,
            interval=sorted(interval) if interval and self.metric else None,
            p=self.p,
            p_holm=p_holm,
            seeds_needed=None if shown else self._seeds_needed(tests),
            better=better,
            examples_share=found.rows_share if found else None,
            margin=self.margin,
            not_inferior=shown if self.margin is not None else None,
        )

    def _seeds_needed(self, tests: int) -> int | None:
        """Return the seeds that would show the effect with a probability of 80 %.

        None if no number would: the rows alone vary too much, or there is no effect. Normal
        quantiles are used, so that for very few seeds the number is slightly too small.
        """
        from scipy import stats

        mean = self._mean
        effect = abs(mean) if self.margin is None else mean + self.margin
        if self.found is None or effect <= ROUNDING:
            return None
        reach = float(stats.norm.isf(LEVEL / tests / 2) + stats.norm.ppf(POWER))
        count = len(self.layouts)
        of_rows = sum(each.of_rows for each in self.layouts) / count**2
        one_seed = sum(each.of_seeds * each.seeds for each in self.layouts) / count**2
        left = (effect / reach) ** 2 - of_rows
        if left <= 0:
            return None
        return min(MOST_SEEDS, max(self.seeds + 1, int(np.ceil(one_seed / left))))

    @property
    def _mean(self) -> float:
        """The mean difference over tasks; positive where ``a`` is better."""
        return sum(each.mean for each in self.layouts) / len(self.layouts)


def _pair(
    a: str,
    b: str,
    ours: Mapping[tuple[str, int], _Run],
    theirs: Mapping[tuple[str, int], _Run],
    metrics: Mapping[str, str | None],
    margin: float | None,
) -> _Pair | None:
    """Return a pair; None if the methods do not share two seeds of any task.

    Raises:
        FileFormatError: their runs have different numbers of test rows.
    """
    seeds = common_seeds(ours, theirs)
    if not seeds:
        return None
    layouts, signs = [], []
    for task, common in seeds.items():
        sign = -1.0 if scale_of(metrics[task]).lower_is_better else 1.0
        pairs = [(ours[task, seed], theirs[task, seed]) for seed in common]
        if len({len(run.values) for pair in pairs for run in pair}) > 1:
            what = f"the runs of {a} and {b} on {task} have different numbers of test rows"
            raise FileFormatError(what, fix="train them on the same data")
        values_SN = np.stack([sign * (first.values - second.values) for first, second in pairs])
        means_S = [sign * (first.score - second.score) for first, second in pairs]
        layouts.append(layout(values_SN, means_S))
        signs += means_S
    metric = common_metric([metrics[task] for task in seeds])
    distinct = len(set().union(*seeds.values()))
    return _Pair(a, b, layouts, crossed(layouts), distinct, metric, signs, margin)
