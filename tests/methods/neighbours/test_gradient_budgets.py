"""Budgets of memory size methods that train all of W; budgets of parameters cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import base_folder, data_folder
from support.tiny_models import one_thread

from sparsegrad_cli.recipe.budget import Budget, Kind
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.study.budget.counting import Counting
from sparsegrad_cli.study.budget.solve import Pick, UnreachableError, solve

HIDDEN, INNER = 16, 12
HEAD = 8 * (2 * HIDDEN + 2) + 2 * 4  # moments of weight and bias, and two counters of steps


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block with an MLP of 16 x 12, and a task."""
    folder = tmp_path_factory.mktemp("tiny")
    base_folder(folder / "base", num_hidden_layers=1, intermediate_size=INNER)
    data_folder(folder / "data")
    return folder


@pytest.fixture(scope="module")
def counting() -> Counting:
    return Counting("cpu")


def recipe(place: Path, method: str) -> LoadedRecipe:
    settings = (f"model={place / 'base'}", "task=csv", f"task.path={place / 'data'}")
    more = ("task.max_length=16", "train.per_device_train_batch_size=8", "train.use_cpu=true")
    return load_recipe(None, (*settings, *more, f"method={method}"))


def picked(place: Path, method: str, kind: Kind, amount: float, counting: Counting) -> Pick:
    budget = Budget(kind, amount, f"{kind}={amount}")
    return solve(recipe(place, method), budget, counting, own_size=False)


def settings_of(pick: Pick) -> dict[str, Any]:
    return pick.recipe.recipe.method.model_dump()


def test_optimizer_state_gives_the_rank_to_the_byte(place: Path, counting: Counting) -> None:
    def galore(rank: int) -> int:  # per target: two moments (r, 16), P (12, r), a counter
        return HEAD + 2 * (4 * (2 * rank * HIDDEN + INNER * rank) + 4)

    room = galore(6) - 1
    pick = picked(place, "{name: galore}", "optimizer_state", room, counting)
    assert (settings_of(pick)["rank"], pick.predicted) == (5, galore(5))
    assert pick.larger is not None and pick.larger[1] == galore(6)


def test_optimizer_state_gives_the_share_of_columns(place: Path, counting: Counting) -> None:
    def frugal(share: float) -> int:  # per target: two moments (out, c), indices, a counter
        sides = ((INNER, HIDDEN), (HIDDEN, INNER))
        counts = [(out, max(1, round(share * columns))) for out, columns in sides]
        return HEAD + sum(8 * out * c + 8 * c + 4 for out, c in counts)

    pick = picked(place, "{name: frugal}", "optimizer_state", frugal(0.5) + 8, counting)
    assert pick.predicted == frugal(settings_of(pick)["share"]) == frugal(0.5)


def test_a_budget_of_parameters_points_to_memory(place: Path, counting: Counting) -> None:
    everything = 2 * HIDDEN * INNER
    with pytest.raises(UnreachableError) as caught:
        picked(place, "{name: galore}", "trainable", everything - 1, counting)
    assert caught.value.takes == everything
    assert "optimizer_state=SIZE or peak=SIZE" in caught.value.fix
    pick = picked(place, "{name: galore}", "trainable", everything, counting)
    assert (settings_of(pick)["rank"], pick.predicted) == (8, everything)
    assert "every parameter" in pick.limit
