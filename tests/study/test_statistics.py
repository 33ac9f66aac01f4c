"""Check intervals, the sign-flip test and Holm's correction against definitions and scipy."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats
from support.study_cells import pair_tests_of, study_cells

from sparsegrad_cli.study.statistics import (
    DRAWS,
    EXACT,
    MOST_SEEDS,
    POWER,
    holm,
    mean,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    std,
    student,
)


def brute_p(values: list[float]) -> float:
    """Return the p-value by enumerating all signs."""
    observed = abs(sum(values))
    sums = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in product((1, -1), repeat=len(values))
    ]
    return sum(abs(total) >= observed - 1e-12 for total in sums) / len(sums)


def test_mean_and_std_of_few_values() -> None:
    assert mean([]) is None and std([1.0]) is None and std([1.0, 3.0]) == math.sqrt(2)
    assert student([]) is None and student([[1.0]]) is None and student([[1.0, 2.0], [1.0]]) is None
    assert student([[0.5, 0.5, 0.5]]) is None  # equal values give no interval
    # Nor do values that differ only by rounding.
    ties = [155 / 277 - 150 / 277, 165 / 277 - 160 / 277]
    assert ties[0] != ties[1] and student([ties]) is None
    assert student([[0.1 + 0.2, 0.3, 0.3]]) is None
    assert student([[5 / 277, 6 / 277]]) is not None


def test_student_of_one_group_equals_scipys_interval_and_paired_test() -> None:
    ours, theirs = [0.61, 0.63, 0.66, 0.60], [0.58, 0.62, 0.61, 0.59]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = student([differences])
    assert found is not None
    half = 3.182446305284263 * std(differences) / 2  # type: ignore[operator]  # t(0.975, 3), sqrt 4
    centre = sum(differences) / 4
    assert math.isclose(found.low, centre - half) and math.isclose(found.high, centre + half)
    expected = stats.ttest_rel(ours, theirs)
    assert math.isclose(found.p, expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert math.isclose(found.low, interval.low) and math.isclose(found.high, interval.high)


def test_student_of_two_groups_equals_welchs_test() -> None:
    """mean(a) + mean(b) over its error is Welch's statistic of a against -b."""
    a, b = [0.3, 0.5, 0.1, 0.2], [0.05, 0.09, 0.02]
    found = student([a, b])
    assert found is not None
    expected = stats.ttest_ind(a, [-v for v in b], equal_var=False)
    assert math.isclose(found.p, expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert math.isclose(found.low, interval.low / 2) and math.isclose(found.high, interval.high / 2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_sign_flip_p_counts_every_choice_of_signs(count: int) -> None:
    draw = np.random.default_rng(count)
    for _ in range(5):
        values = [round(float(v), 2) for v in draw.normal(0.4, 1.0, count)]  # rounded: ties
        assert math.isclose(sign_flip_p(values), brute_p(values))
        assert sign_flip_p(values) == sign_flip_p([-v for v in values])
        assert math.isclose(sign_flip_p(values), sign_flip_p([1000 * v for v in values]))


def test_sign_flip_p_equals_scipys_paired_permutation_test() -> None:
    draw = np.random.default_rng(3)
    ours, theirs = draw.normal(0.3, 1, 9), draw.normal(0, 1, 9)
    expected = stats.permutation_test(
        (ours, theirs),
        lambda x, y: float(np.mean(x - y)),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    assert math.isclose(sign_flip_p(list(ours - theirs)), float(expected))


def test_sign_flip_p_of_equal_sizes_equals_the_sign_test() -> None:
    def p(plus: int, count: int) -> float:
        return sign_flip_p([1.0] * plus + [-1.0] * (count - plus))

    assert math.isclose(p(23, EXACT), stats.binomtest(23, EXACT).pvalue)
    drawn, exact = p(29, 44), float(stats.binomtest(29, 44).pvalue)
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / DRAWS)
    assert p(29, 44) == drawn  # the draws have a fixed seed


def test_sign_flip_p_and_smallest_p_of_edge_cases() -> None:
    assert sign_flip_p([]) == sign_flip_p([0.0, 0.0]) == sign_flip_p([0.3, -0.3]) == 1.0
    assert sign_flip_p([0.2, 0.0, 0.4, 0.0]) == sign_flip_p([0.2, 0.4]) == 0.5
    for count in range(1, 12):
        assert smallest_p([0.1, -0.2, 0.3] * 4)  # any signs
        assert smallest_p([float(-1 - i) for i in range(count)]) == 2.0 ** (1 - count)
    assert smallest_p([1.0] * 60) == 1 / (1 + DRAWS)


@pytest.mark.parametrize(
    ("groups", "tests"),
    [
        ([[0.1, 0.3, 0.2]], 1),
        ([[0.1, 0.3, -0.2, 0.4]], 3),
        ([[0.1, 0.3], [0.5, 0.2, 0.3]], 6),
        ([[-0.2, -0.25]], 1),
    ],
)
def test_seeds_needed_is_the_first_number_with_enough_power(
    groups: list[list[float]], tests: int
) -> None:
    """The power is that of the noncentral t distribution, by numerical integration over chi."""
    level, tasks = 0.05 / tests, len(groups)

    def power(seeds: int) -> float:
        parts = [np.var(group, ddof=1) / seeds / tasks**2 for group in groups]
        freedom = sum(parts) ** 2 / sum(part**2 / (seeds - 1) for part in parts)
        effect = abs(np.mean([np.mean(group) for group in groups])) / math.sqrt(sum(parts))
        critical = stats.t.ppf(1 - level / 2, freedom)
        chi = stats.chi(freedom)
        at = np.linspace(float(chi.ppf(1e-12)), float(chi.ppf(1 - 1e-12)), 20_001)
        inside = stats.norm.cdf(effect - critical * at / math.sqrt(freedom)) * chi.pdf(at)
        return float(np.trapezoid(inside, at))

    needed = seeds_needed(groups, tests)
    assert needed is not None
    possible = [n for n in range(2, 3000) if 2.0 ** (1 - n * tasks) <= level]
    assert needed == next(n for n in possible if power(n) >= POWER)


def test_seeds_needed_of_zero_equal_and_tiny_differences() -> None:
    assert seeds_needed([[0.1, -0.1]], 1) is None
    assert seeds_needed([[0.0, 0.0]], 1) is None
    assert seeds_needed([[0.2, 0.2]], 1) == 6  # no spread: only the permutation test limits
    assert seeds_needed([[0.2, 0.2]], 3) == 7
    assert seeds_needed([[1.0, -0.999]], 1) == MOST_SEEDS


def test_holm_equals_a_worked_example() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 is 0.03, 0.06, 0.04; never less than before: 0.06.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_holm_rejects_the_same_as_its_step_down_rule() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        ps = list(draw.uniform(0, 0.08, 6))
        rejected: set[int] = set()
        for step, at in enumerate(sorted(range(6), key=lambda i: ps[i])):
            if ps[at] > 0.05 / (6 - step):
                break
            rejected.add(at)
        assert {at for at, p in enumerate(holm(ps)) if p <= 0.05} == rejected


def test_equal_methods_are_rarely_called_different() -> None:
    """Of 300 studies of four equal methods, at most 5 % (+3 sd) report a difference."""
    draw = np.random.default_rng(5)
    wrong = 0
    for _ in range(300):
        scores = {task: {m: list(draw.standard_t(2, 5)) for m in "abcd"} for task in ("x", "y")}
        tests = pair_tests_of(study_cells(scores))
        wrong += any(pair["better"] for pair in tests["pairs"])
    assert wrong / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
