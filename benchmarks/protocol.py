r"""Level and power of tests over seeds and examples, by simulation (docs/explanation/protocol.md).

python -m benchmarks.protocol data --glue GLUE --out DATA
python -m benchmarks.protocol pilot STUDY... --scores docs/results/core_glue.json \
    --out docs/results/protocol_pilot.json
python -m benchmarks.protocol simulate --pilot docs/results/protocol_pilot.json \
    --out docs/results/protocol_power.json

``data`` makes the folder that the studies read: CoLA, RTE and SST-2 as they are, and QNLI divided
from its development set, since its training set is not at hand. ``pilot`` reads test.csv of the
runs of comparisons, and measures for each task how far runs of one method agree with each other,
and with those of another method. A few seeds are enough for that, but not for the spread of scores
over seeds, which comes from an earlier study of more seeds. ``simulate`` draws studies of two
methods that agree as much, and counts how often each test finds a difference where there is none
(level), and where there is one of some points (power).

A simulated answer is right if its latent quality is above zero. The quality is the sum of
independent normal parts: the row (shared by all runs), the row under the method, the run, and a
rest; and of the method's mean. The parts of the rows have the tetrachoric correlations of the
pilot. Learning rates that tuning chose badly shift a method's mean: once for all seeds if they
share one tuning, or for each seed by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from benchmarks.common import save
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.run.test_answers import read_answers
from sparsegrad_cli.study.crossed import crossed, layout
from sparsegrad_cli.study.statistics import LEVEL, sign_flip_p, student

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]
DRAWS = 1000  # of the bootstrap


# --- the data

_WHOLE = ("CoLA", "RTE", "SST-2")
_QNLI_TEST = (
    1000  # rows of QNLI's development set that are for the test; the others are for training
)


def make_data(glue: Path, out: Path) -> None:
    """Link the tasks that are used whole, and divide QNLI's development set at random."""
    for name in _WHOLE:
        (out / name).mkdir(parents=True, exist_ok=True)
        for split in ("train.tsv", "dev.tsv"):
            link = out / name / split
            link.unlink(missing_ok=True)
            link.symlink_to((glue / name / split).resolve())
    header, *rows = (glue / "QNLI" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    order = random.Random(0).sample(range(len(rows)), len(rows))
    test, train = sorted(order[:_QNLI_TEST]), sorted(order[_QNLI_TEST:])
    (out / "QNLI").mkdir(exist_ok=True)
    for split, chosen in (("train.tsv", train), ("dev.tsv", test)):
        lines = [header, *(rows[row] for row in chosen)]
        (out / "QNLI" / split).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"QNLI: {len(train)} rows to train on, {len(test)} for the test")


# --- the pilot


@dataclass(frozen=True)
class TaskModel:
    """What the simulation knows of a task.

    Attributes:
        name: the task.
        metric: accuracy or matthews_correlation.
        labels: test rows of class 0 and 1.
        recalls: mean share of right answers in class 0 and 1.
        within: mean agreement (both right or both wrong) of two runs of one method.
        between: the same of two runs of different methods.
        run_points: standard deviation of the score over seeds, 100 times the fraction.
    """

    name: str
    metric: str
    labels: tuple[int, int]
    recalls: tuple[float, float]
    within: float
    between: float
    run_points: float

    @property
    def rows(self) -> int:
        """Number of test rows."""
        return sum(self.labels)


def read_pilot(folder: Path) -> list[TaskModel]:
    """Return the model of each task of a study's folder, from its runs' first test sets."""
    record = StudyRecord.model_validate_json((folder / "compare.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, list[tuple[_Bools, float]]]] = {}
    labels: dict[str, npt.NDArray[np.int64]] = {}
    metrics: dict[str, str] = {}
    for cell in record.cells:
        if cell.status != "done" or cell.run_dir is None:
            continue
        answers = next(iter(read_answers(folder / cell.run_dir).values()))
        true = np.array([answer.label for answer in answers])
        given = np.array([answer.prediction for answer in answers])
        run = load_run(folder / cell.run_dir)
        assert run.metrics and run.metrics.test and run.metrics.test.score is not None
        labels[cell.task], metrics[cell.task] = true, run.metrics.test.metric or ""
        mine = found.setdefault(cell.task, {}).setdefault(cell.method, [])
        mine.append((true == given, run.metrics.test.score))
    return [
        _task_model(task, metrics[task], labels[task], methods) for task, methods in found.items()
    ]


def with_spread(tasks: Sequence[TaskModel], scores: Path) -> list[TaskModel]:
    """Return the tasks with the standard deviation over seeds of another study, where it has them.

    Args:
        tasks: the tasks.
        scores: compare.json of the study. Variances are averaged over its methods.
    """
    rows = json.loads(scores.read_text(encoding="utf-8"))["rows"]
    found = []
    for task in tasks:
        spreads = [row["score_std"] for row in rows if row["task"] == task.name]
        if spreads:
            points = 100 * math.sqrt(statistics.mean(spread**2 for spread in spreads))
            task = replace(task, run_points=points)
        found.append(task)
    return found


def _task_model(
    name: str,
    metric: str,
    labels: npt.NDArray[np.int64],
    methods: Mapping[str, Sequence[tuple[_Bools, float]]],
) -> TaskModel:
    runs = [(method, right) for method, each in methods.items() for right, _ in each]
    within: list[float] = []
    between: list[float] = []
    for (first, a), (second, b) in itertools.combinations(runs, 2):
        (within if first == second else between).append(float((a == b).mean()))
    if not within or not between:
        raise SystemExit(f"{name}: a pilot needs two methods, and two seeds of one of them")

    def recall(label: int) -> float:
        return statistics.mean(float(right[labels == label].mean()) for _, right in runs)

    variances = [statistics.variance(s for _, s in each) for each in methods.values() if each[1:]]
    return TaskModel(
        name,
        metric,
        labels=(int((labels == 0).sum()), int((labels == 1).sum())),
        recalls=(recall(0), recall(1)),
        within=statistics.mean(within),
        between=statistics.mean(between),
        run_points=100 * math.sqrt(statistics.mean(variances)),
    )


# --- simulated studies


class Parts(NamedTuple):
    """The parts of the latent quality of a task, in units of the rows' standard deviation.

    Attributes:
        means: mean of class 0 and 1, (2,).
        between, within: correlation of two runs of different methods, and of one method.
        run: standard deviation of the run's part.
        point: shift of the mean that changes the expected score by 0.01.
    """

    means: tuple[float, float]
    between: float
    within: float
    run: float
    point: float


def parts_of(task: TaskModel) -> Parts:
    """Solve the parts so that scores and agreements are those of the pilot."""
    means = tuple(float(stats.norm.ppf(recall)) for recall in task.recalls)
    point = _shift(task, means, 0.01)
    return Parts(
        means=(means[0], means[1]),
        between=_correlation(task, means, task.between),
        within=max(_correlation(task, means, task.within), _correlation(task, means, task.between)),
        run=task.run_points * point,
        point=point,
    )


def _correlation(task: TaskModel, means: Sequence[float], agreement: float) -> float:
    """Return the correlation of two runs' qualities at which they agree on this share of rows."""

    def agree(rho: float) -> float:
        share = 0.0
        for mean, count in zip(means, task.labels, strict=True):
            both = stats.multivariate_normal.cdf([mean, mean], cov=[[1, rho], [rho, 1]])
            share += count / task.rows * (1 - 2 * stats.norm.cdf(mean) + 2 * both)
        return float(share)

    if agreement <= agree(0.0):
        return 0.0
    return float(optimize.brentq(lambda rho: agree(rho) - agreement, 0.0, 0.9999, xtol=1e-4))


def _shift(task: TaskModel, means: Sequence[float], points: float) -> float:
    def expected(shift: float) -> float:
        recalls = [float(stats.norm.cdf(mean + shift)) for mean in means]
        right = np.array([recalls[y] * task.labels[y] for y in (0, 1)])
        return float(score_of(task, right[0], right[1]))

    base = expected(0.0)
    return float(optimize.brentq(lambda shift: expected(shift) - base - points, -3.0, 3.0))


def score_of(task: TaskModel, right0: Any, right1: Any) -> Any:
    """Return the score from the numbers of right answers in class 0 and 1, of any shape."""
    zeros, ones = task.labels
    if task.metric == "accuracy":
        return (right0 + right1) / (zeros + ones)
    tn, fp, tp, fn = right0, zeros - right0, right1, ones - right1
    return _matthews(tn, fp, tp, fn)


def _matthews(tn: Any, fp: Any, tp: Any, fn: Any) -> Any:
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(below > 0, (tp * tn - fp * fn) / np.where(below > 0, below, 1.0), 0.0)


def draw_right(
    task: TaskModel,
    parts: Parts,
    seeds: int,
    points: float,
    rate: tuple[float, bool],
    draw: np.random.Generator,
) -> _Bools:
    """Return the right answers of a simulated study of two methods, (2, seeds, rows).

    Args:
        task, parts: the task.
        seeds: number of seeds.
        points: the first method's score minus the second's, in expectation.
        rate: standard deviation in points that chosen rates add, and whether seeds share them.
        draw: source of random numbers. Rows of class 0 come first.
    """
    rows = task.rows
    mean_N = np.repeat(parts.means, task.labels)
    row_N = math.sqrt(parts.between) * draw.standard_normal(rows)
    own_MN = math.sqrt(parts.within - parts.between) * draw.standard_normal((2, 1, rows))
    rest = math.sqrt(1 - parts.within) * draw.standard_normal((2, seeds, rows))
    run = parts.run * draw.standard_normal((2, seeds, 1))
    size, shared = rate
    chosen = size * parts.point * draw.standard_normal((2, 1 if shared else seeds, 1))
    shift = np.array([points / 2, -points / 2]).reshape(2, 1, 1) * parts.point
    quality = mean_N + row_N + own_MN + rest + run + chosen + shift
    found: _Bools = quality > 0
    return found


# --- tests


def counts_of(task: TaskModel, right: Any) -> tuple[Any, Any]:
    """Return the numbers of right answers in class 0 and 1 along the last axis."""
    zeros = task.labels[0]
    return right[..., :zeros].sum(axis=-1), right[..., zeros:].sum(axis=-1)


def pseudo(task: TaskModel, right: _Bools) -> _Floats:
    """Return jackknife pseudovalues as crossed.pseudo_values does, of any shape (..., rows)."""
    if task.metric == "accuracy":
        return right.astype(np.float64)
    rows, (zeros, ones) = task.rows, task.labels
    n0, n1 = (each[..., None] for each in counts_of(task, right))
    whole = _matthews(n0, zeros - n0, n1, ones - n1)
    less = {
        (0, True): _matthews(n0 - 1, zeros - n0, n1, ones - n1),
        (0, False): _matthews(n0, zeros - n0 - 1, n1, ones - n1),
        (1, True): _matthews(n0, zeros - n0, n1 - 1, ones - n1),
        (1, False): _matthews(n0, zeros - n0, n1, ones - n1 - 1),
    }
    is_zero = np.arange(rows) < zeros
    without = np.where(
        is_zero,
        np.where(right, less[0, True], less[0, False]),
        np.where(right, less[1, True], less[1, False]),
    )
    found: _Floats = rows * whole - (rows - 1) * without
    return found


Data = Sequence[tuple[TaskModel, _Bools]]


def by_crossed(data: Data, least: float | None = None) -> float:
    """Return the p-value of the test over seeds and rows (study/crossed.py)."""
    found = crossed([_layout(task, right) for task, right in data])
    return 1.0 if found is None else found.p(least)


def _layout(task: TaskModel, right: _Bools) -> Any:
    scores = score_of(task, *counts_of(task, right))
    values = pseudo(task, right)
    return layout(values[0] - values[1], scores[0] - scores[1])


def by_seeds(data: Data) -> float:
    """Return the p-value of Student's t over seeds alone, tasks as strata."""
    found = student([_differences(task, right) for task, right in data])
    return 1.0 if found is None else found.p


def by_signs(data: Data) -> float:
    """Return the p-value of the sign-flip test, differences divided by their root mean square."""
    values = []
    for task, right in data:
        found = np.array(_differences(task, right))
        size = math.sqrt(float((found**2).mean()))
        values += [float(value) / size if size else 0.0 for value in found]
    return sign_flip_p(values)


def _differences(task: TaskModel, right: _Bools) -> list[float]:
    scores = score_of(task, *counts_of(task, right))
    return [float(value) for value in scores[0] - scores[1]]


def by_bootstrap(data: Data, draw: np.random.Generator) -> float:
    """Return the p-value of a percentile bootstrap over seeds and rows, both drawn with return."""
    total = np.zeros(DRAWS)
    for task, right in data:
        zeros = task.labels[0]
        seeds = right.shape[1]
        weights = draw.multinomial(task.rows, np.full(task.rows, 1 / task.rows), DRAWS)
        is_zero = np.arange(task.rows) < zeros
        counts = [
            np.einsum("bn,msn->bms", weights[:, rows], part[..., rows].astype(np.float64))
            for rows in (is_zero, ~is_zero)
            for part in (right, ~right)
        ]
        n0, wrong0, n1, wrong1 = counts
        if task.metric == "accuracy":
            scores = (n0 + n1) / task.rows
        else:
            scores = _matthews(n0, wrong0, n1, wrong1)
        drawn = draw.integers(0, seeds, (DRAWS, seeds))
        differences = np.take_along_axis(scores[:, 0] - scores[:, 1], drawn, axis=1).mean(axis=1)
        total += differences / len(data)
    below, above = float((total <= 0).mean()), float((total >= 0).mean())
    return min(1.0, 2 * min(below, above) + 1 / DRAWS)


# --- the table


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Return the share of simulated studies in which each test finds a difference."""
    pilot = json.loads(options.pilot.read_text(encoding="utf-8"))
    tasks = [
        TaskModel(**{**each, "labels": tuple(each["labels"]), "recalls": tuple(each["recalls"])})
        for each in pilot["tasks"]
    ]
    solved = [(task, parts_of(task)) for task in tasks]
    rows = []
    for seeds, points, shared in itertools.product(options.seeds, options.points, (False, True)):
        if shared and points:
            continue  # The level alone shows what shared rates do.
        found = _shares(solved, seeds, points, (options.rate_points, shared), options)
        rows.append({"seeds": seeds, "points": points, "shared_rates": shared, **found})
        print(json.dumps(rows[-1]), flush=True)
    return {
        "settings": {
            "studies": options.studies,
            "bootstrap_studies": options.bootstrap_studies,
            "rate_points": options.rate_points,
            "level": LEVEL,
            "tests": options.tests,
            "margin": options.margin,
        },
        "parts": {task.name: parts._asdict() for task, parts in solved},
        "rows": rows,
    }


def _shares(
    solved: Sequence[tuple[TaskModel, Parts]],
    seeds: int,
    points: float,
    rate: tuple[float, bool],
    options: argparse.Namespace,
) -> dict[str, float]:
    draw = np.random.default_rng([seeds, int(1000 * points), int(rate[1])])
    strict = LEVEL / options.tests
    hits: dict[str, list[bool]] = {}

    def count(name: str, p: float, level: float = LEVEL) -> None:
        hits.setdefault(name, []).append(p <= level)

    plain: dict[str, Callable[[Data], float]] = {
        "sign_flip": by_signs,
        "seeds_t": by_seeds,
        "crossed": by_crossed,
    }
    for number in range(options.studies):
        data = [
            (task, draw_right(task, parts, seeds, points, rate, draw)) for task, parts in solved
        ]
        for name, test in plain.items():
            count(name, test(data))
        count("crossed_strict", by_crossed(data), strict)
        count("crossed_not_inferior", 2 * by_crossed(data, -options.margin / 100))
        if number < options.bootstrap_studies:
            count("bootstrap", by_bootstrap(data, draw))
    return {name: statistics.mean(map(float, each)) for name, each in hits.items()}


def main() -> None:
    """Parse the arguments, run a part and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    data = parts.add_parser("data")
    data.add_argument("--glue", type=Path, required=True, help="folder of the original files")
    data.add_argument("--out", type=Path, required=True)
    pilot = parts.add_parser("pilot")
    pilot.add_argument("studies", type=Path, nargs="+", help="folders of runs with task.holdout")
    pilot.add_argument("--scores", type=Path, help="compare.json of a study with more seeds")
    power = parts.add_parser("simulate")
    power.add_argument("--pilot", type=Path, required=True)
    power.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 8, 10])
    power.add_argument("--points", nargs="+", type=float, default=[0.0, 1.0, 2.0, 3.0])
    power.add_argument("--rate-points", type=float, default=1.5, help="sd that chosen rates add")
    power.add_argument("--studies", type=int, default=1000)
    power.add_argument("--bootstrap-studies", type=int, default=300)
    power.add_argument(
        "--tests", type=int, default=7, help="rivals, for the strictest step of Holm"
    )
    power.add_argument("--margin", type=float, default=1.0, help="of non-inferiority, in points")
    for each in (pilot, power):
        each.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part == "data":
        make_data(options.glue, options.out)
    elif options.part == "pilot":
        tasks = [task for study in options.studies for task in read_pilot(study)]
        if options.scores is not None:
            tasks = with_spread(tasks, options.scores)
        save(options.out, "protocol_pilot", {"tasks": [asdict(task) for task in tasks]})
    else:
        save(options.out, "protocol_power", simulate(options))


if __name__ == "__main__":
    main()
