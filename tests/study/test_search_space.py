"""Spaces of tuning, first points, the best trial and edges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import SMALL, Cli

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe.load_recipe import digest, with_settings
from sparsegrad_cli.recipe.study import LoadedStudy, load_study, make_study
from sparsegrad_cli.records.study import Edge, Trial
from sparsegrad_cli.study.folder import study_digest
from sparsegrad_cli.study.optuna_trials import best_trial, edges
from sparsegrad_cli.study.parity import check_parity
from sparsegrad_cli.study.search_space import (
    RATE,
    Dimension,
    first_point,
    series_of,
    space_of,
)

ROWS = (
    "methods:\n"
    "  - full\n"
    "  - {label: lora, method: lora, train: {learning_rate: 3e-3}}\n"
    "  - meprop\n"
    "  - {label: dense, method: {name: sparsegrad, support: dense, rank: 32}}\n"
    "tasks: [builtin:acceptability, {name: glue/rte, methods: {meprop: {learning_rate: 7e-4}}}]\n"
    "seeds: [1, 2]\n"
)


def study(folder: Path, tune: str) -> LoadedStudy:
    (folder / "s.yaml").write_text(f"{ROWS}tune: {tune}\n", encoding="utf-8")
    return load_study(folder / "s.yaml")


def problems(folder: Path, tune: str) -> str:
    with pytest.raises(RecipeError) as caught:
        study(folder, tune)
    return str(caught.value)


def trial(number: int, score: float | None, *, loss: float = 1.0, **changes: Any) -> Trial:
    made = {"number": number, "status": "done", "metric": "accuracy", "score": score, "loss": loss}
    return Trial.model_validate({**made, "settings": {RATE: 1e-3 * (number + 1)}, **changes})


def test_learning_rates_span_the_same_decades_for_every_method(tmp_path: Path) -> None:
    found = study(tmp_path, "{space: {learning_rate: {decades: 1.5, centres: {full: 5e-5}}}}")
    series = series_of(found)
    assert len(series) == 8 and {s.task for s in series} == {"builtin:acceptability", "glue/rte"}
    for each in series:
        (rate,) = each.space
        assert rate.key == RATE and rate.log and rate.low and rate.high and rate.centre
        assert math.isclose(math.log10(rate.high / rate.low), 1.5, abs_tol=1e-3)
        assert math.isclose(rate.low * rate.high, rate.centre**2, rel_tol=1e-3)
    where = {(s.task[:4], s.label): (s.space[0].centre, s.space[0].centre_from) for s in series}
    assert where["buil", "full"] == where["glue", "full"] == (5e-5, "tune")
    assert where["buil", "lora"] == where["glue", "lora"] == (3e-3, "study")
    assert where["buil", "meprop"] == (1e-3, "measured")
    assert where["glue", "meprop"] == (7e-4, "study")
    assert where["buil", "dense"] == (3e-4, "measured")


def test_first_points_are_an_even_grid_that_starts_at_the_centre() -> None:
    found = make_study(None, ("full", "lora"), 1, (), trials=2)
    for cell in found.cells:
        space = space_of(found, cell)
        points = [first_point(space, number)[RATE] for number in range(7)]
        assert points[0] == space[0].centre
        centre = space[0].centre or 0
        exponents = sorted(math.log10(point / centre) for point in points)
        assert exponents == pytest.approx([-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75], abs=1e-3)
        assert sorted(points[:3]) == [points[1], points[0], points[2]]


def test_further_keys_are_the_same_for_all_methods_and_fill_their_ranges(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        "{space: {warmup_steps: {low: 0, high: 0.3}, weight_decay: [0, 0.01, 0.1], "
        "lr_scheduler_type: [linear, cosine]}}",
    )
    spaces = [series.space for series in series_of(found)]
    assert all(space[1:] == spaces[0][1:] for space in spaces)
    points = [first_point(spaces[0], number) for number in range(30)]
    assert {point["train.weight_decay"] for point in points} == {0, 0.01, 0.1}
    assert {point["train.lr_scheduler_type"] for point in points} == {"linear", "cosine"}
    shares = [point["train.warmup_steps"] for point in points]
    assert 0 <= min(shares) < 0.03 and 0.27 < max(shares) <= 0.3
    # Every point gives a recipe that differs from the run's only in these keys and the seed.
    cell = found.cells[0]
    made = with_settings(cell.loaded.recipe, points[4], seed=9)
    assert made.train.warmup_steps == points[4]["train.warmup_steps"] and made.seed == 9
    back = {key: getattr(cell.loaded.recipe.train, key.split(".")[1]) for key in points[4]}
    again = with_settings(made, back, seed=cell.seed)
    assert digest(again) == digest(cell.loaded.recipe) != digest(made)


def test_a_tuned_warm_up_works_with_the_default_scheduler(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    settings = "settings: {train: {lr_scheduler_type: constant, warmup_steps: 0}}\n"
    path.write_text(f"{ROWS}{settings}tune: {{space: {{warmup_steps: {{low: 1, high: 9}}}}}}\n")
    found = load_study(path)
    (series, *_) = series_of(found)
    steps = {first_point(series.space, number)["train.warmup_steps"] for number in range(9)}
    assert steps <= set(range(1, 10)), "whole steps"
    made = with_settings(series.recipe, {"train.warmup_steps": 4}).train
    assert (made.lr_scheduler_type, made.warmup_steps) == ("constant_with_warmup", 4)
    cells = tuple(
        replace(
            cell,
            loaded=replace(
                cell.loaded,
                recipe=with_settings(
                    cell.loaded.recipe, {"train.warmup_steps": 4 if cell.label == "lora" else 0}
                ),
            ),
        )
        for cell in found.cells
    )
    assert check_parity(replace(found, cells=cells)).flagged == []


def test_ends_and_choices_of_a_dimension() -> None:
    rate = Dimension(RATE, 1e-4, 1e-2, log=True)
    assert (rate.at(0), rate.at(0.5), rate.at(1)) == (1e-4, 1e-3, 1e-2)
    assert rate.rounded(9.99999e-3) == 1e-2 and rate.rounded(0.0123456) == 1e-2
    assert Dimension("k", 0.0, 0.3).at(0.5) == 0.15
    chosen = Dimension("k", choices=("a", "b", "c"))
    assert [chosen.at(share) for share in (0, 0.34, 0.99, 1)] == ["a", "b", "c", "c"]


def test_the_best_trial_is_chosen_by_score_then_loss_then_order() -> None:
    trials = [trial(0, 0.5), trial(1, 0.7, loss=0.9), trial(2, 0.7, loss=0.8), trial(3, 0.6)]
    best = best_trial(trials)
    assert best is not None and best.number == 2
    trials[1] = trial(1, 0.7, loss=0.8)
    best = best_trial(trials)
    assert best is not None and best.number == 1
    trials[1] = trial(1, 0.7, status="pruned")
    trials[2] = trial(2, None, status="failed")
    best = best_trial(trials)
    assert best is not None and best.number == 3
    losses = [trial(n, score, metric="perplexity") for n, score in enumerate((9.0, 7.5, 8.0))]
    best = best_trial(losses)
    assert best is not None and best.number == 1  # lower is better
    assert best_trial([trial(0, 0.1, status="failed")]) is None and best_trial([]) is None


def test_a_best_rate_at_the_end_of_its_range_is_an_edge() -> None:
    space = (Dimension(RATE, 1e-4, 1e-1, log=True), Dimension("train.k", choices=(1, 2)))
    scores = [0.1, 0.3, 0.2]
    trials = [trial(n, score) for n, score in enumerate(scores)]
    assert edges(space, trials) == []
    for number, end in ((0, "lowest"), (2, "highest")):
        shifted = [trial(n, 0.9 if n == number else 0.1) for n in range(3)]
        assert edges(space, shifted) == [Edge(key=RATE, end=end)]
    # Failed and pruned trials count as tried.
    beyond = trial(3, None, status="failed")
    assert edges(space, [trial(0, 0.1), trial(2, 0.9), beyond]) == []
    assert edges(space, [beyond]) == []


def test_tuning_seeds_must_differ_from_reported_seeds(tmp_path: Path) -> None:
    said = problems(tmp_path, "{seeds: [5, 2]}")
    assert "tune.seeds: 2: tuning must not use" in said and "such as 101" in said
    with pytest.raises(RecipeError, match="tuning must not use"):
        load_study(_reported(tmp_path, "[101, 3]"), trials=3)  # by default, too
    assert study(tmp_path, "{seeds: [5, 6]}").study.tune is not None


def _reported(folder: Path, seeds: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(f"methods: [lora]\nseeds: {seeds}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ("1", "tune.trials: 1 should be greater than or equal to 2"),
        ("{trials: many}", "tune.trials"),
        ("{space: {rows: {lara: {method.rslora: [false, true]}}}}", "lara"),
        ("{space: {rows: {lora: {method.rank: [2, 4]}}}}", "not its size"),
        ("{space: {rows: {lora: {train.warmup_steps: [0, 1]}}}}", "a key of the method"),
        ("{space: {rows: {lora: {method.rslora: [1, 7]}}}}", "true or false"),
        ("{space: {rows: {lora: {method.nothing: [1, 7]}}}}", "nothing"),
        ("{space: {warmup_stepz: [0, 1]}}", "did you mean warmup_steps"),
        ("{space: {max_steps: [10, 20]}}", "tune.space.max_steps: is not a key here"),
        ("{space: {weight_decay: {low: 1, high: 0.1}}}", "low must be below high"),
        ("{space: {weight_decay: {low: 0, high: 1, log: true}}}", "low above 0"),
        ("{space: {weight_decay: [0.1]}}", "at least 2"),
        ("{space: {weight_decay: [0.1, 0.1]}}", "names a value twice"),
        ("{space: {adam_beta1: {low: 0.5, high: 1.5}}}", "train.adam_beta1 cannot be 1.5"),
        ("{space: {lr_scheduler_type: [linear, cosin]}}", "cannot be 'cosin'"),
        ("{space: {learning_rate: {decades: 0}}}", "decades"),
        ("{space: {learning_rate: {centres: {lorra: 1e-3}}}}", "did you mean lora"),
        ("{seeds: [7, 7]}", "names a seed twice"),
        ("{space: {lr_scheduler_type: [constant, constant_with_warmup]}}", "are the same"),
        ("{space: {warmup_steps: {low: 0, high: 100}}}", "must not mix the two"),
    ],
)
def test_an_invalid_space_is_refused(tmp_path: Path, tune: str, said: str) -> None:
    assert said in problems(tmp_path, tune)


def test_a_tuned_key_cannot_be_set_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.learning_rate: is tuned.*centres"):
        make_study(None, ("lora",), 1, ("train.learning_rate=1e-3",), trials=3)
    make_study(None, ("lora",), 1, ("train.weight_decay=0.1",), trials=3)
    assert make_study(None, ("lora",), 1, ("train.learning_rate=1e-3",)).study.tune is None


def test_trials_on_the_command_line_override_the_study(tmp_path: Path) -> None:
    found = study(tmp_path, "5")
    assert found.study.tune is not None and found.study.tune.trials == 5
    more = load_study(tmp_path / "s.yaml", trials=9)
    assert more.study.tune is not None and more.study.tune.trials == 9
    assert study_digest(found) != study_digest(more)  # another comparison


def test_parity_counts_tuned_keys_as_declared(tmp_path: Path) -> None:
    text = ROWS.replace("  - meprop", "  - {method: meprop, train: {warmup_steps: 3}}")
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"train\.warmup_steps"):
        check_parity(load_study(path))
    path.write_text(f"{text}tune: {{space: {{warmup_steps: [0, 3]}}}}\n", encoding="utf-8")
    parity = check_parity(load_study(path)).to_json()
    assert parity["flagged"] == []
    assert {d["key"] for d in parity["declared"]} == {RATE, "train.warmup_steps"}


def test_validate_and_compare_check_tuning_before_any_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("methods: [lora, full]\ntune: 4\n", encoding="utf-8")
    valid = cli("validate", "t.yaml")
    assert valid.code == 0, valid.err
    assert "4 runs, after 4 trials of tuning for each of 2 methods on 1 task" in valid.out
    refused = cli("compare", "t.yaml", "-o", "c", *SMALL, "train.learning_rate=1")
    assert refused.code == 2 and "is tuned" in refused.flat
    assert cli("compare", "t.yaml", "--tune", "1", "-o", "c").code == 2
    assert not (tmp_path / "c").exists()


def test_a_row_has_keys_of_its_own(tmp_path: Path) -> None:
    ratio = "{low: 1, high: 16, log: true}"
    keys = f"{{method.rslora: [false, true], train.lora_plus_ratio: {ratio}}}"
    found = study(tmp_path, f"{{space: {{rows: {{lora: {keys}}}}}}}")
    spaces = {series.label: [each.key for each in series.space] for series in series_of(found)}
    own = ["method.rslora", "train.lora_plus_ratio"]
    assert spaces["lora"] == [RATE, *own]
    assert all(keys == [RATE] for label, keys in spaces.items() if label != "lora")
    lora = next(series for series in series_of(found) if series.label == "lora")
    tried = [first_point(lora.space, number) for number in range(6)]
    assert {point["method.rslora"] for point in tried} == {False, True}
    recipe = with_settings(lora.recipe, tried[1], 7)
    assert recipe.method.rslora == tried[1]["method.rslora"]  # type: ignore[attr-defined]
    assert recipe.train.lora_plus_ratio == tried[1]["train.lora_plus_ratio"]
