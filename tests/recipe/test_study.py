"""Studies: expansion into runs, matched counts, short forms, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import REPO

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.recipe.study import load_study, make_study


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_is_valid(path: Path) -> None:
    study = load_study(path)
    methods = len(study.study.methods)
    tasks = max(1, len(study.study.tasks))
    assert len(study.cells) == methods * tasks * len(study.study.seeds)
    assert methods >= 4


def test_paper_study_uses_tuned_values_of_each_task_and_the_papers_rank() -> None:
    study = load_study(REPO / "recipes" / "paper_table_5_roberta.yaml")
    cell = next(c for c in study.cells if (c.task, c.label, c.seed) == ("glue/qqp", "lora", 3705))
    assert cell.loaded.recipe.train.learning_rate == 5.11e-6
    assert isinstance(cell.loaded.recipe.method, LoraSettings)
    assert cell.loaded.recipe.method.rank == 7 and cell.loaded.recipe.seed == 3705
    figure = next(
        f for f in study.study.figures if (f.task, f.method) == ("glue/rte", "sparsegrad")
    )
    assert (figure.score, figure.std) == (0.656, 0.021)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("methods: [lora]\ntrain: {max_steps: 5}", "for all runs it is written settings: {train"),
        ("methods: [lora]\nmax_steps: 5", "it is written train.max_steps, under settings"),
    ],
)
def test_key_of_a_recipe_in_a_study_is_told_its_place(tmp_path: Path, text: str, fix: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_study(tmp_path / "s.yaml")
    assert fix in (caught.value.problems[0].fix or "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methods: []", "methods: the list is empty"),
        ("methods: lora", "methods: expected a list, got 'lora'"),
        ("methods: [lora]\nsettings: {train.max_steps: 4}", "nested: train: {max_steps: ...}"),
    ],
)
def test_a_value_of_a_wrong_type_is_explained(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_study(tmp_path / "s.yaml")
    assert says in str(caught.value)


PAPER = {
    "paper_table_3": ("steps_per_s", 4.7, "average", "lora"),
    "paper_table_4": ("score", 0.647, "glue/rte", "sparsegrad"),
    "paper_table_5_bert": ("score", 0.825, "average", "full"),
    "paper_table_5_roberta": ("score", 0.825, "average", "meprop"),
    "paper_table_6": ("score", 1.247, "oasst", "sparsegrad"),
    "paper_table_11": ("score", 0.677, "glue/rte", "sparsegrad-1"),
    "paper_table_12": ("score", 0.694, "glue/rte", "sparsegrad-1.4"),
    "paper_table_13": ("learning_rate", 6.81e-5, "glue/rte", "sparsegrad"),
    "paper_table_14": ("learning_rate", 3.05e-5, "glue/rte", "sparsegrad"),
    "paper_table_15": ("learning_rate", 1.02e-5, "glue/rte", "sparsegrad"),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_studies_have_published_figures_and_accept_both_scopes(name: str) -> None:
    path = REPO / "recipes" / f"{name}.yaml"
    study = load_study(path)
    key, value, task, method = PAPER[name]
    figures = study.study.figures
    found = [f for f in figures if (f.task, f.method) == (task, method)]
    assert [getattr(figure, key) for figure in found] == [value]
    # Every figure belongs to an existing row.
    rows = {(cell.task, cell.label) for cell in study.cells}
    assert {(f.task, f.method) for f in figures if f.task != "average"} <= rows
    scopes = {cell.loaded.recipe.scope for cell in study.cells}
    assert scopes == {"head" if name == "paper_table_6" else "rest"}  # the paper's LLaMA is frozen
    narrow = load_study(path, ("scope=head",))
    assert {cell.loaded.recipe.scope for cell in narrow.cells} == {"head"}


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("{source: x, task: glue/rte, method: full}", "give score"),
        ("{source: x, task: glue/rte, method: full, std: 1, peak_mb: 3}", "std needs a score"),
        ("{source: x, task: glue/rte, method: full, steps_per_s: 0}", "greater than 0"),
    ],
)
def test_a_figure_needs_a_value(tmp_path: Path, figure: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"methods: [full]\nfigures:\n  - {figure}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_study(path)
    assert message in str(caught.value)


def test_command_line_comparison_matches_counts_by_the_recipes_density() -> None:
    study = make_study(None, ("lora", "meprop", "sparsegrad"), 2, ("method.density=0.02",))
    assert [c.seed for c in study.cells] == [42, 42, 42, 3705, 3705, 3705]
    densities = {c.label: c.loaded.recipe.method.model_dump()["density"] for c in study.cells}
    assert densities == {"lora": 0.02, "meprop": 0.02, "sparsegrad": 0.02}
    assert all(c.loaded.recipe.match == "trainable" for c in study.cells if c.label == "lora")


def lora_with_a_rank(folder: Path) -> str:
    path = folder / "my recipe.yaml"
    text = "extends: configs/quickstart.yaml\nmethod: {name: lora, rank: 8}\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_rank_that_matches_nothing_is_refused_with_its_line(tmp_path: Path) -> None:
    source = lora_with_a_rank(tmp_path)
    with pytest.raises(RecipeError) as caught:
        make_study(source, ("lora", "sparsegrad"), 2, ())
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("method.rank", 2) and "rank 8" in problem.what
    for match, methods in (("none", ("lora", "sparsegrad")), (None, ("lora", "full"))):
        cells = make_study(source, methods, 1, (), match=match).cells
        assert cells[0].loaded.recipe.method.model_dump()["rank"] == 8


def test_any_file_or_run_gives_a_valid_study_name(tmp_path: Path) -> None:
    assert make_study(lora_with_a_rank(tmp_path), ("full",), 1, ()).study.name == "my-recipe"
    run = tmp_path / "first run"
    run.mkdir()
    (run / "recipe.yaml").write_text("method: full\nseed: 9\n", encoding="utf-8")
    study = make_study(str(run), ("full", "lora"), 1, ())
    assert study.study.name == "first-run" and study.cells[0].seed == 42
    (tmp_path / f"{'x' * 200}.yaml").write_text("method: full\n", encoding="utf-8")
    long = make_study(str(tmp_path / f"{'x' * 200}.yaml"), ("full",), 1, ())
    assert long.study.name == "x" * 80


def test_overrides_apply_to_all_rows_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "methods:\n"
        "  - {label: full, method: full, train: {learning_rate: 1e-4}}\n"
        "  - {method: {name: lora, rank: 4}}\n"
        "tasks:\n"
        "  - {name: glue/rte, methods: {full: {learning_rate: 3e-4, warmup_steps: 9}}}\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    cells = load_study(path, ("train.learning_rate=5e-5",)).cells
    assert {c.loaded.recipe.train.learning_rate for c in cells} == {5e-5}
    assert cells[0].loaded.recipe.train.warmup_steps == 9
    for override, fix in (
        ("seed=7", "--seeds"),
        ("output_dir=runs/foo", "--output-dir"),
        ("method.name=lora", "--methods"),
        ("method=lora", "--methods"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_study(path, (override,))
        (problem,) = caught.value.problems
        assert problem.key == override.partition("=")[0] and fix in (problem.fix or "")
    path.write_text(path.read_text().replace("method: full,", "method: {name: full, rank: 1},"))
    with pytest.raises(RecipeError, match="every row of the study"):
        load_study(path, ("method.rank=7",))


def test_a_study_can_change_settings_per_method_and_task(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "name: mine\n"
        "recipe: configs/quickstart.yaml\n"
        "methods:\n"
        "  - {label: full, method: full, train: {learning_rate: 1e-4}}\n"
        "  - {label: kind, method: {name: sparsegrad}, calibration: {basis_per: kind}}\n"
        "  - {label: r4, method: {name: lora, rank: 4}}\n"
        "tasks:\n"
        "  - builtin:acceptability\n"
        "settings: {train: {max_steps: 5}}\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    cells = {c.label: c.loaded.recipe for c in load_study(path).cells}
    assert cells["full"].train.learning_rate == 1e-4
    assert cells["kind"].calibration.basis_per == "kind"
    assert cells["kind"].train.learning_rate == 1e-3
    assert cells["r4"].method.model_dump()["rank"] == 4 and cells["r4"].match is None
    assert all(recipe.train.max_steps == 5 for recipe in cells.values())


def test_several_learning_rates_give_several_rows(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "methods:\n"
        "  - {method: lora, learning_rates: [5e-4, 0.001, 1.25e-2], train: {warmup_steps: 3}}\n"
        "  - {label: all, method: full, learning_rates: [1e-4]}\n"
        "seeds: [1]\n",
        encoding="utf-8",
    )
    trains = {c.label: c.loaded.recipe.train for c in load_study(path).cells}
    assert {label: train.learning_rate for label, train in trains.items()} == {
        "lora-5e-4": 5e-4,
        "lora-1e-3": 1e-3,
        "lora-1.25e-2": 1.25e-2,
        "all-1e-4": 1e-4,
    }
    assert trains["lora-1e-3"].warmup_steps == 3
    path.write_text("methods: [{method: lora, learning_rates: [fast]}]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"learning_rate"):
        load_study(path)


def test_a_method_can_have_its_own_rate_on_a_task(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = (
        "methods:\n"
        "  - {label: full, method: full, train: {learning_rate: 1e-4}}\n"
        "  - lora\n"
        "tasks:\n"
        "  - {name: glue/rte, methods: {full: {learning_rate: 3e-4}}}\n"
        "  - {name: glue/cola, train: {learning_rate: 2e-3}, methods: {lora: {warmup_steps: 9}}}\n"
        "seeds: [1]\n"
    )
    path.write_text(text, encoding="utf-8")
    trains = {(c.task, c.label): c.loaded.recipe.train for c in load_study(path).cells}
    rates = {key: train.learning_rate for key, train in trains.items()}
    assert rates == {
        ("glue/rte", "full"): 3e-4,
        ("glue/rte", "lora"): 1e-3,
        ("glue/cola", "full"): 1e-4,
        ("glue/cola", "lora"): 2e-3,
    }
    assert trains["glue/cola", "lora"].warmup_steps == 9
    path.write_text(text.replace("methods: {lora", "methods: {lorra"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)tasks\[1\]\.methods.*did you mean lora"):
        load_study(path)


def test_errors_name_the_row_and_are_not_repeated_per_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        make_study(None, ("lora", "merop"), 2, ())
    assert "did you mean meprop?" in str(caught.value)
    path = tmp_path / "s.yaml"
    path.write_text(
        "methods: [{label: a, method: {name: lora, ranks: 4}}]\nseeds: [1, 2, 3]\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError) as caught:
        load_study(path)
    assert len(caught.value.problems) == 1
    assert "did you mean rank?" in str(caught.value)
    path.write_text("methods: [lora]\nseed: 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)seed.*did you mean seeds"):
        load_study(path)
    path.write_text("methods: [lora, lora]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="same label"):
        load_study(path)
