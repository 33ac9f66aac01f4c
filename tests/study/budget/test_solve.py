"""Check the budget solver against an exhaustive search on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import base_folder, data_folder, sentences
from support.study_cells import measured_in
from support.tiny_models import one_thread

from sparsegrad_cli.errors import FileFormatError, RecipeError, UsageError
from sparsegrad_cli.recipe.budget import Budget, Kind
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, load_recipe
from sparsegrad_cli.recipe.study import LoadedStudy, load_study
from sparsegrad_cli.records.study import BudgetBlock
from sparsegrad_cli.study.budget.counting import Counting
from sparsegrad_cli.study.budget.solve import Pick, UnreachableError, at_size, settings_of, solve
from sparsegrad_cli.study.budget.solve_study import solve_study

BATCH = 8
LORA, DENSE = "{name: lora}", "{name: sparsegrad, support: dense}"
STATIC = "{name: sparsegrad}"


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block with an MLP of 16 x 12, and a task."""
    folder = tmp_path_factory.mktemp("tiny")
    base_folder(folder / "base", num_hidden_layers=1, intermediate_size=12)
    data_folder(folder / "data")
    return folder


@pytest.fixture(scope="module")
def counting() -> Counting:
    """Share one counter among all tests, so that each fake run happens once."""
    return Counting("cpu")


def recipe(place: Path, method: str, *overrides: str) -> LoadedRecipe:
    settings = (
        f"model={place / 'base'}",
        "task=csv",
        f"task.path={place / 'data'}",
        "task.max_length=16",
        f"train.per_device_train_batch_size={BATCH}",
        "train.use_cpu=true",
        f"method={method}",
    )
    return load_recipe(None, (*settings, *overrides))


def picked(loaded: LoadedRecipe, kind: Kind, amount: float, counting: Counting) -> Pick:
    return solve(loaded, Budget(kind, amount, f"{kind}={amount}"), counting, own_size=False)


def rank_of(pick: Pick) -> int:
    rank = pick.recipe.recipe.method.model_dump()["rank"]
    assert isinstance(rank, int)
    return rank


def smallest(loaded: LoadedRecipe, kind: Kind, amount: float, counting: Counting) -> float:
    with pytest.raises(UnreachableError) as caught:
        picked(loaded, kind, amount, counting)
    return caught.value.takes


# --- ranks, all of them


@pytest.mark.parametrize(("method", "most"), [(LORA, 12), (DENSE, 16)])
def test_solved_ranks_equal_those_of_an_exhaustive_search(
    place: Path, counting: Counting, method: str, most: int
) -> None:
    loaded = recipe(place, method)
    sizes = loaded.recipe.method.size_range(counting.shapes(loaded))
    assert sizes is not None and (sizes.least, sizes.most) == (1, most)
    # Calibration here needs less than the step: its basis is random.
    loaded = replace_calibration(loaded)
    at = {rank: at_size(loaded, rank) for rank in range(1, most + 1)}
    both = {rank: (counting.step(cell), counting.state(cell)) for rank, cell in at.items()}
    for number, kind in enumerate(("peak", "optimizer_state")):
        known = {rank: figures[number] for rank, figures in both.items()}
        assert list(known.values()) == sorted(known.values())
        for room in {known[1], known[most // 2], known[most - 1] + 1, known[most], 10**9}:
            pick = picked(loaded, kind, room, counting)  # type: ignore[arg-type]
            best = max(rank for rank in known if known[rank] <= room)
            assert rank_of(pick) == best
            assert pick.predicted == known[best]
            assert (pick.larger is None) == (best == most)
            if pick.larger is not None:
                assert pick.larger[1] == known[best + 1]
            else:
                assert pick.limit
        if kind == "optimizer_state":
            assert smallest(loaded, "optimizer_state", known[1] - 1, counting) == known[1]


def replace_calibration(loaded: LoadedRecipe) -> LoadedRecipe:
    section = loaded.recipe.calibration.model_copy(
        update={"source": "original", "decomposition": "exact", "warmup_steps": 0}
    )
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"calibration": section}))


@pytest.mark.parametrize("method", [LORA, DENSE, STATIC, "{name: meprop, select: rows}"])
def test_a_budget_of_parameters_is_met_as_closely_as_possible(
    place: Path, counting: Counting, method: str
) -> None:
    loaded = recipe(place, method)
    shapes = counting.shapes(loaded)
    sizes = loaded.recipe.method.size_range(shapes)
    assert sizes is not None
    every = (at_size(loaded, n).recipe for n in range(sizes.least, sizes.most + 1))
    known = [at.method.sizing(shapes).trainable for at in every]
    for wanted in (min(known), 97, 100, 233, max(known), 10_000):
        pick = picked(loaded, "trainable", wanted, counting)
        assert pick.predicted == max(count for count in known if count <= wanted)
        assert pick.recipe.recipe.method.sizing(shapes).trainable == pick.predicted
        if method == STATIC and wanted < max(known):
            assert pick.predicted == wanted  # to the entry
    assert smallest(loaded, "trainable", min(known) - 0.5, counting) == min(known)


# --- numbers of parameters under bytes


def test_a_budget_of_optimizer_state_is_met_to_the_byte(place: Path, counting: Counting) -> None:
    loaded = recipe(place, STATIC)
    least = smallest(loaded, "optimizer_state", 8, counting)
    for more in (0, 7, 8, 800, 801):
        pick = picked(loaded, "optimizer_state", least + more, counting)
        assert pick.predicted == least + more // 8 * 8  # two moments of four bytes an entry


def test_at_most_a_thousandth_of_a_peak_is_unused_below_the_next_rank(
    place: Path, counting: Counting
) -> None:
    loaded = replace_calibration(recipe(place, STATIC))
    for room in (160 * 1024, 190 * 1024):
        pick = picked(loaded, "peak", room, counting)
        assert pick.predicted <= room
        if pick.larger is None:
            assert room - pick.predicted <= 1e-3 * room or "every parameter" in pick.limit
        else:
            assert pick.larger[1] > room


def test_the_recipes_number_is_kept_if_more_parameters_cost_no_memory(
    place: Path, counting: Counting
) -> None:
    free = recipe(place, "{name: meprop, density: 0.05}")
    pick = picked(free, "optimizer_state", 10**6, counting)
    assert pick.recipe.recipe == free.recipe and "no more memory" in pick.limit
    with pytest.raises(UnreachableError) as caught:
        picked(free, "optimizer_state", 100, counting)
    assert "state_capacity" in caught.value.fix
    bounded = recipe(place, "{name: meprop, density: 0.05, state_capacity: 2}")
    room = counting.state(free) - 500
    pick = picked(bounded, "optimizer_state", room, counting)
    assert room - 100 < pick.predicted <= room


# --- batches


def test_the_batch_is_reduced_only_if_the_smallest_size_does_not_fit(
    place: Path, counting: Counting
) -> None:
    full, lora = recipe(place, "full"), recipe(place, LORA)
    whole = counting.step(full)
    pick = picked(full, "peak", whole, counting)
    assert pick.recipe.recipe == full.recipe and pick.larger is None and pick.shape == [8, 11]
    pick = picked(full, "peak", whole - 1, counting)
    assert settings_of(full, pick.recipe) == {
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
    }
    assert pick.larger == ("a batch of 8", whole) and pick.shape == [4, 11]
    assert pick.predicted <= whole - 1
    # LoRA at rank 1 fits at the full batch, so the batch is kept.
    pick = picked(lora, "peak", whole - 1, counting)
    assert pick.recipe.recipe.train == lora.recipe.train


def test_accumulated_gradients_are_counted(place: Path, counting: Counting) -> None:
    """At half the batch, a step also holds the gradients of earlier micro-batches."""
    twice = recipe(place, "full", "train.gradient_accumulation_steps=2")
    once = recipe(place, "full")
    gradients = 4 * sum((2 * 16 * 12, 16 * 16 + 16, 16 * 2 + 2))  # MLP, pooler, classifier
    assert 0 < counting.step(twice) - counting.step(once) <= gradients


def test_the_calibration_batch_is_reduced_before_size_and_batch(
    place: Path, counting: Counting
) -> None:
    small = ("train.per_device_train_batch_size=2", "calibration.batch_size=32")
    loaded = recipe(place, STATIC, "calibration.steps=3", *small)
    sizes = loaded.recipe.method.size_range(counting.shapes(loaded))
    assert sizes is not None
    least = at_size(loaded, sizes.least)
    room = counting.calibration(least) - 1
    assert room > counting.step(least)
    pick = picked(loaded, "peak", room, counting)
    found = settings_of(loaded, pick.recipe)
    assert found["calibration.batch_size"] < 32
    # Calibration reads the same number of examples, and the step is unchanged.
    assert found["calibration.batch_size"] * found["calibration.steps"] == 3 * 32
    assert pick.recipe.recipe.train == loaded.recipe.train
    assert counting.calibration(pick.recipe) <= room and pick.predicted <= room


def test_the_longest_rows_come_from_the_data_or_from_max_length(
    place: Path, counting: Counting
) -> None:
    lengths = sorted((len(text) for text, _ in sentences(1, 48)), reverse=True)
    assert counting.longest(recipe(place, "full")).lengths == tuple(lengths[:BATCH])
    pick = picked(recipe(place, "full"), "peak", 10**9, counting)
    assert pick.shape == [8, 11] and pick.shape_from == "the longest examples of the data"
    fixed = picked(recipe(place, "full", "task.padding=fixed"), "peak", 10**9, counting)
    assert fixed.shape == [8, 16]
    # Longer padding takes memory only where it is computed.
    padded, wide = (
        picked(recipe(place, "full", "train.unpadded=false", *more), "peak", 10**9, counting)
        for more in ((), ("task.padding=fixed",))
    )
    assert wide.predicted > padded.predicted > pick.predicted
    assert fixed.predicted < padded.predicted
    far = recipe(place, "full", "task=glue/sst2", "task.path=null", "model=bert-base-uncased")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        longest = counting.longest(far)
    assert longest.width == 16 and "out of reach" in longest.source


def test_a_recipe_that_cannot_be_counted_is_an_error(place: Path, counting: Counting) -> None:
    share = recipe(place, "{name: sparsegrad, support: dense, rank: 0.9}")
    for kind, own in (("peak", True), ("trainable", True)):
        with pytest.raises(UsageError, match="share of energy"):
            solve(share, Budget(kind, 10**9, ""), counting, own_size=own)  # type: ignore[arg-type]
    packed = recipe(place, LORA, "model.quantization=4bit")
    with pytest.raises(UsageError, match="quantized"):
        picked(packed, "peak", 10**9, counting)


# --- studies


STUDY = """
name: tiny
methods:
  - {{label: full, method: full{full}}}
  - {{label: lora, method: {lora}}}
  - {{label: twice, method: lora, train: {{learning_rate: 2e-3}}}}
tasks: [{{name: csv, task: {{path: {place}/data, max_length: 16}}}}]
settings:
  model: {place}/base
  train: {{per_device_train_batch_size: 8, use_cpu: true}}
seeds: [1, 2]
match: {match}
"""


def study(
    place: Path, match: str, *overrides: str, full: str = "", lora: str = "lora"
) -> LoadedStudy:
    path = place / "s.yaml"
    text = STUDY.format(place=place, match=match, full=full, lora=lora)
    path.write_text(text, encoding="utf-8")
    return load_study(path, overrides)


def block(rows: list[dict[str, Any]]) -> BudgetBlock:
    return BudgetBlock.model_validate({"rows": rows})


def test_every_run_gets_the_solved_settings_and_records_them(place: Path) -> None:
    solved = solve_study(study(place, "trainable=150", full=", matched: false"))
    assert solved.budget is not None
    for cell in solved.cells:
        method = cell.loaded.recipe.method.model_dump()
        assert cell.label == "full" or (method["rank"], method["density"]) == (2, None)
    full, lora, twice = solved.budget.to_json()["rows"]
    assert full["matched"] is False and full["set"] == {}
    assert lora["matched"] and (lora["predicted"], lora["remainder"]) == (112, 38)
    assert lora["larger"] == {"size": "rank 3", "takes": 168}
    assert twice["key"] == lora["key"]  # the solution does not depend on the learning rate
    assert solved.cells[2].loaded.recipe.train.learning_rate == 2e-3


def test_solved_sizes_of_an_interrupted_study_are_kept(place: Path) -> None:
    first = solve_study(study(place, "trainable=150", full=", matched: false"))
    assert first.budget is not None
    rows = [
        {**row, "set": {**row["set"], "method.rank": 7}} for row in first.budget.to_json()["rows"]
    ]
    kept = block([{**row, "set": {}} if not row["matched"] else row for row in rows])
    again = solve_study(study(place, "trainable=150", full=", matched: false"), kept=kept)
    assert again.cells[1].loaded.recipe.method.model_dump()["rank"] == 7
    other = solve_study(study(place, "trainable=151", full=", matched: false"), kept=kept)
    assert other.cells[1].loaded.recipe.method.model_dump()["rank"] == 2
    # A block read from an unfinished comparison gives the same block.
    same = solve_study(
        study(place, "trainable=150", full=", matched: false"),
        kept=BudgetBlock.model_validate(measured_in(first.budget.to_json(), [])),
    )
    assert same.budget == first.budget and same.cells == first.cells


@pytest.mark.parametrize("wrong", [{"a.b.c": 1}, {"train.learning_rate": 9.0}])
def test_a_recorded_row_with_other_keys_is_solved_again(place: Path, wrong: object) -> None:
    asked = study(place, "trainable=150", full=", matched: false")
    first = solve_study(asked)
    assert first.budget is not None
    kept = block([{**row, "set": wrong} for row in first.budget.to_json()["rows"]])
    assert solve_study(asked, kept=kept).cells == first.cells


@pytest.mark.parametrize("rank", ["7", -1, 10**400, None, [2]])
def test_a_recorded_size_that_is_invalid_is_one_error(place: Path, rank: object) -> None:
    asked = study(place, "trainable=150", full=", matched: false")
    first = solve_study(asked)
    assert first.budget is not None
    picked = {"method.rank": rank} if rank is not None else {"method.entries": 7}
    kept = block([{**row, "set": picked} for row in first.budget.to_json()["rows"]])
    with pytest.raises(FileFormatError, match="sets an invalid") as caught:
        solve_study(asked, kept=kept)
    assert caught.value.where is not None and "compare.json" in caught.value.where


def test_a_row_that_sets_its_size_keeps_it_and_must_fit(place: Path) -> None:
    own = "{name: lora, rank: 3}"
    solved = solve_study(study(place, "trainable=1k", full=", matched: false", lora=own))
    assert solved.budget is not None
    row = solved.budget.to_json()["rows"][1]
    assert (
        row["set"] == {} and row["size"] == "rank 3" and "the study sets its size" in row["limit"]
    )
    with pytest.raises(RecipeError, match=r"rank 3\) it takes 168 parameters"):
        solve_study(study(place, "trainable=167", full=", matched: false", lora=own))


def test_all_unreachable_budgets_are_reported_with_the_amounts_needed(place: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        solve_study(study(place, "trainable=50"))
    full, lora = caught.value.problems  # the second LoRA row has the same solution
    assert "too little for full on csv" in full.what and "384 parameters" in full.what
    assert "(rank 1) it takes 56 parameters" in lora.what
    assert full.file == str(place / "s.yaml") and full.line == 12 and full.key == "match"
    assert "allow trainable=384" in str(full.fix) and "matched: false" in str(full.fix)
    assert solve_study(study(place, "trainable=384")).budget is not None


def test_a_size_for_all_runs_is_refused_under_a_budget(place: Path) -> None:
    with pytest.raises(RecipeError, match="the budget trainable=1k chooses it") as caught:
        solve_study(study(place, "trainable=1k", "method.density=0.02"))
    assert caught.value.problems[0].key == "method.density"
    assert caught.value.problems[0].file == "command line"
