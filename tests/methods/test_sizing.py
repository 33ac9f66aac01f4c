"""The size of a method: what it trains at each size, and how far sizes go."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from support.tiny_models import classifier, orthogonal_bases, targets_of

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.base import MethodSettings, TargetShapes
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings, rank_for_density
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.sizing import count_for_density, split_by_size
from sparsegrad_cli.recipe.load_recipe import load_recipe

METHODS = {
    "full": "{name: full}",
    "lora": "{name: lora}",
    "meprop": "{name: meprop, density: 0.05}",
    "rows": "{name: meprop, select: rows, density: 0.1}",
    "materialized": "{name: sparsegrad, form: materialized, density: 0.05}",
    "rotated": "{name: sparsegrad, form: rotated, density: 0.05}",
    "static": "{name: sparsegrad, density: 0.05}",
    "static, of a rank": "{name: sparsegrad, density: 0.05, rank: 5}",
    "dynamic": "{name: sparsegrad, support: dynamic, density: 0.05}",
    "refresh": "{name: sparsegrad, support: refresh, density: 0.05, rank: 6}",
    "dense": "{name: sparsegrad, support: dense, rank: 6}",
}


def settings_of(text: str) -> MethodSettings:
    return load_recipe(None, (f"method={text}",)).recipe.method


def layers(*shapes: tuple[int, int]) -> TargetShapes:
    return TargetShapes([Target(f"t{n}", "k", n, *s, False) for n, s in enumerate(shapes)])


def trained(settings: MethodSettings) -> int:
    """What the method itself counts on a real model."""
    model = classifier()
    targets = targets_of(model)
    settings, _ = settings.settle_for_estimate(TargetShapes(targets))
    bases = orthogonal_bases(targets, torch.float32) if settings.calibrates else None
    prepared = settings.implementation().prepare(model, targets, scope="head", bases=bases)
    return prepared.counts.trainable_targets


@pytest.mark.parametrize("name", METHODS)
def test_the_size_is_what_the_method_counts(name: str) -> None:
    settings, shapes = settings_of(METHODS[name]), TargetShapes(targets_of(classifier()))
    assert settings.sizing(shapes).trainable == trained(settings)
    sizes = settings.size_range(shapes)
    if sizes is None:
        assert name == "full"
        return
    for size in (sizes.least, (sizes.least + sizes.most) // 3, sizes.most):
        at = settings.with_size(size)
        assert at.sizing(shapes).trainable == trained(at)
        if sizes.fine and name != "rows" and size < sizes.most:
            assert at.sizing(shapes).trainable == size  # exactly
    assert f"{sizes.most:,}" in settings.with_size(sizes.most).sizing(shapes).text or name in (
        "rows",  # whole rows
        "static",  # a core as wide as the layers cannot be filled to a third
        "dynamic",
    )


def test_larger_sizes_never_train_fewer() -> None:
    shapes = layers((40, 16), (16, 40), (33, 7))
    for name, text in METHODS.items():
        settings = settings_of(text)
        found = settings.size_range(shapes)
        if found is not None:
            sizes = range(found.least, found.most + 1, max(1, found.most // 150))
            counts = [settings.with_size(size).sizing(shapes).trainable for size in sizes]
            # Where targets differ in size, rounding may move a parameter to one that is full.
            assert all(b >= a - 1 for a, b in pairwise(counts)), name
            assert counts[-1] == max(counts)


def test_levels_begin_where_the_rank_rises() -> None:
    settings, shapes = settings_of(METHODS["static"]), layers((40, 16), (16, 40), (33, 7))
    sizes = settings.size_range(shapes)
    assert sizes is not None and sizes.levels is not None

    def rank(size: int) -> int:
        at = settings.with_size(size)
        assert isinstance(at, SparsegradSettings)
        return rank_for_density(at, shapes.targets)

    ranks = [rank(size) for size in range(sizes.least, sizes.most + 1)]
    firsts = [n for n in range(len(ranks)) if n == 0 or ranks[n] > ranks[n - 1]]
    levels = sizes.levels
    assert [levels.start(n) - sizes.least for n in range(len(levels))] == firsts
    assert all(levels.is_last(levels.start(n) - 1) for n in range(1, len(levels)))
    for other in ("static, of a rank", "lora", "dense", "meprop"):
        found = settings_of(METHODS[other]).size_range(shapes)
        assert found is not None and found.levels is None


def test_which_methods_need_more_memory_at_a_larger_size() -> None:
    shapes = layers((40, 16))
    found = {name: settings_of(text).size_range(shapes) for name, text in METHODS.items()}
    costs = {name for name, sizes in found.items() if sizes is not None and sizes.costs_memory}
    assert costs == {"lora", "static", "static, of a rank", "dynamic", "refresh", "dense"}
    bounded = settings_of("{name: meprop, state_capacity: 3}").size_range(shapes)
    assert bounded is not None and bounded.costs_memory


# --- a number of parameters over targets


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0.01, 5898), (1.0, 589824), (0.5, 294912), (1e-9, 1), (1 / 589824, 1)],
)
def test_a_density_is_a_rounded_number_of_parameters(density: float, expected: int) -> None:
    assert count_for_density(density, 1536, 384) == expected


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        count_for_density(density, 10, 10)


@pytest.mark.parametrize("seed", range(30))
def test_a_number_is_split_by_size_exactly(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 7, 640, 4096, 589_824]) for _ in range(draw.randrange(1, 14))]
    total = draw.randrange(len(sizes), sum(sizes) + 1)
    shares = split_by_size(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 1 <= share <= size
        fair = 1 + (total - len(sizes)) * (size - 1) / max(1, sum(sizes) - len(sizes))
        assert abs(share - fair) < 1
    assert split_by_size(sum(sizes), sizes) == sizes
    assert split_by_size(len(sizes), sizes) == [1] * len(sizes)


def test_equal_targets_differ_by_one_at_most() -> None:
    assert split_by_size(70_000, [589_824] * 12) == [5834] * 4 + [5833] * 8


@pytest.mark.parametrize("total", [0, 2, 22])
def test_a_number_that_cannot_be_split_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        split_by_size(total, [7, 7, 7])


@pytest.mark.parametrize("name", ["meprop", "sparsegrad"])
def test_more_parameters_than_there_are_is_one_clear_error(name: str) -> None:
    settings = settings_of(f"{{name: {name}, entries: 4000000}}")
    with pytest.raises(UsageError, match=r"4,000,000.*3 targets have 3,?") as caught:
        settings.sizing(layers((40, 16), (16, 40), (99, 26)))
    assert caught.value.where == "method.entries"


def test_a_core_of_a_named_rank_can_be_filled_whatever_the_shapes() -> None:
    settings, shapes = (
        settings_of(METHODS["static, of a rank"]),
        layers((40, 16), (16, 40), (33, 7)),
    )
    sizes = settings.size_range(shapes)
    assert sizes is not None
    assert settings.with_size(sizes.most).sizing(shapes).trainable == 3 * 5 * 5
    assert settings.with_size(sizes.most - 1).sizing(shapes).trainable < 3 * 5 * 5
    sizes = settings.size_range(layers((40, 16), (16, 40)))
    assert sizes is not None and sizes.most == 2 * 5 * 5
