"""The size of a method: what a recipe at it trains, and how far it goes."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from tiny import classifier, orthogonal_bases, targets_of

from sparsegrad_cli.calibration.calibrate import basis_keys
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.methods.registry import make_method
from sparsegrad_cli.methods.sparsegrad.core_plan import rank_for_density, with_known_rank
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.supports import shared_out
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.study.budget.sizes import Levels, entries_of, knob_of, levels_of, size_words

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


def recipe(name: str) -> LoadedRecipe:
    return load_recipe(None, (f"method={METHODS[name]}",))


def layers(*shapes: tuple[int, int]) -> list[Target]:
    return [Target(f"t{n}", "k", n, *shape, False) for n, shape in enumerate(shapes)]


def trained(loaded: LoadedRecipe) -> int:
    """What the method itself counts on a real model."""
    model = classifier()
    targets, settings = targets_of(model), loaded.recipe.method
    bases = None
    if isinstance(settings, SparsegradMethod):
        settings = with_known_rank(settings, targets, basis_keys(targets, "layer"), "")
        bases = orthogonal_bases(targets, torch.float32)
    prepared = make_method(settings).prepare(model, targets, scope="head", bases=bases)
    return prepared.counts.trainable_targets


@pytest.mark.parametrize("name", METHODS)
def test_entries_are_those_that_the_method_counts(name: str) -> None:
    loaded, targets = recipe(name), targets_of(classifier())
    assert entries_of(loaded, targets) == trained(loaded)
    knob = knob_of(loaded, targets)
    if knob is None:
        assert name == "full"
        return
    for size in (knob.least, (knob.least + knob.most) // 3, knob.most):
        at = knob.at(loaded, size)
        assert entries_of(at, targets) == trained(at)
        if knob.key == "entries" and name != "rows" and size < knob.most:
            assert entries_of(at, targets) == size  # exactly
    assert f"{knob.most:,}" in size_words(knob.at(loaded, knob.most), targets) or name in (
        "rows",  # whole rows
        "static",  # a core as wide as the layers cannot be filled to a third
        "dynamic",
    )


def test_larger_sizes_never_train_fewer() -> None:
    targets = layers((40, 16), (16, 40), (33, 7))
    for name in METHODS:
        loaded = recipe(name)
        knob = knob_of(loaded, targets)
        if knob is not None:
            sizes = range(knob.least, knob.most + 1, max(1, knob.most // 150))
            counts = [entries_of(knob.at(loaded, size), targets) for size in sizes]
            # Of targets of unlike sizes, rounding may move an entry to one that is full already.
            assert all(b >= a - 1 for a, b in pairwise(counts)), name
            assert counts[-1] == max(counts)


def test_levels_begin_where_the_rank_rises() -> None:
    loaded, targets = recipe("static"), layers((40, 16), (16, 40), (33, 7))
    knob = knob_of(loaded, targets)
    assert knob is not None
    levels = levels_of(knob, loaded, targets)
    assert isinstance(levels, Levels)

    def rank(size: int) -> int:
        settings = knob.at(loaded, size).recipe.method
        assert isinstance(settings, SparsegradMethod)
        return rank_for_density(settings, targets)

    ranks = [rank(size) for size in range(knob.least, knob.most + 1)]
    firsts = [n for n in range(len(ranks)) if n == 0 or ranks[n] > ranks[n - 1]]
    assert [levels.start(n) - knob.least for n in range(len(levels))] == firsts
    assert all(levels.parts(levels.start(n) - 1) for n in range(1, len(levels)))
    for other in ("static, of a rank", "lora", "dense", "meprop"):
        loaded = recipe(other)
        knob = knob_of(loaded, targets)
        assert knob is not None and levels_of(knob, loaded, targets) is None


def test_whose_memory_follows_its_size() -> None:
    targets = layers((40, 16))
    follows = {name: knob_of(recipe(name), targets) for name in METHODS if name != "full"}
    costs = {name for name, knob in follows.items() if knob is not None and knob.costs_memory}
    assert costs == {"lora", "static", "static, of a rank", "dynamic", "refresh", "dense"}
    bounded = load_recipe(None, ("method={name: meprop, state_capacity: 3}",))
    knob = knob_of(bounded, targets)
    assert knob is not None and knob.costs_memory


# --- entries over targets


@pytest.mark.parametrize("seed", range(30))
def test_entries_are_shared_out_by_size_and_exactly(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 7, 640, 4096, 589_824]) for _ in range(draw.randrange(1, 14))]
    total = draw.randrange(len(sizes), sum(sizes) + 1)
    shares = shared_out(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 1 <= share <= size
        fair = 1 + (total - len(sizes)) * (size - 1) / max(1, sum(sizes) - len(sizes))
        assert abs(share - fair) < 1
    assert shared_out(sum(sizes), sizes) == sizes
    assert shared_out(len(sizes), sizes) == [1] * len(sizes)


def test_equal_targets_differ_by_one_at_most() -> None:
    assert shared_out(70_000, [589_824] * 12) == [5834] * 4 + [5833] * 8


@pytest.mark.parametrize("total", [0, 2, 22])
def test_what_cannot_be_shared_out_is_refused(total: int) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        shared_out(total, [7, 7, 7])


@pytest.mark.parametrize("name", ["meprop", "sparsegrad"])
def test_more_entries_than_there_are_is_one_clear_error(name: str) -> None:
    method = f"method={{name: {name}, entries: 4000000}}"
    with pytest.raises(UsageError, match=r"4,000,000.*3 targets have 3,?") as caught:
        entries_of(load_recipe(None, (method,)), layers((40, 16), (16, 40), (99, 26)))
    assert caught.value.where == "method.entries"


def test_a_core_of_a_named_rank_can_be_filled_whatever_the_shapes() -> None:
    loaded, targets = recipe("static, of a rank"), layers((40, 16), (16, 40), (33, 7))
    knob = knob_of(loaded, targets)
    assert knob is not None
    assert entries_of(knob.at(loaded, knob.most), targets) == 3 * 5 * 5
    assert entries_of(knob.at(loaded, knob.most - 1), targets) < 3 * 5 * 5
    alike = layers((40, 16), (16, 40))
    knob = knob_of(loaded, alike)
    assert knob is not None and knob.most == 2 * 5 * 5
