"""Parse ``match`` of a study, and explain invalid values."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_runs import Cli

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.recipe.budget import parse_match
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.recipe.section import SettingError
from sparsegrad_cli.recipe.study import load_study, make_study

WRONG = {
    "peak=2GB": "did you mean peak=2GiB?",
    "optimizer_state=64mb": "did you mean optimizer_state=64MiB?",
    "peak=-1": "such as peak=2GiB",
    "peak=1e9": "such as peak=2GiB",
    "peak=0MiB": "such as peak=2GiB",
    "peak": "such as peak=2GiB",
    "seconds=600": "the report shows run times",
    "trainable=": "such as trainable=70k",
    "trainable=0.3": "such as trainable=70k",
    "trainable=70K": "such as trainable=70k",
    "trainabel=70k": "did you mean trainable?",
    "memory": "such as peak=2GiB, or trainable",
    f"peak={'9' * 400}GiB": "such as peak=2GiB",
    f"trainable={'9' * 5000}": "such as trainable=70k",
    f"trainable={'1' * 30}.5": "such as trainable=70k",
    "trainable=٧": "such as trainable=70k",
}


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("trainable=70k", "trainable", 70_000),
        ("trainable=0.07k", "trainable", 70),
        ("trainable=1.5M", "trainable", 1_500_000),
        ("trainable=12", "trainable", 12),
        ("optimizer_state=64MiB", "optimizer_state", 64 * 2**20),
        ("peak=1.5GiB", "peak", 3 * 2**29),
        ("peak=300 KiB", "peak", 300 * 1024),
    ],
)
def test_parse_match_reads_kind_and_amount(text: str, kind: str, amount: float) -> None:
    budget = parse_match(text)
    assert budget is not None
    assert (budget.kind, budget.amount, budget.text) == (kind, amount, text)
    assert budget.in_bytes == ("iB" in text)


def test_match_trainable_alone_is_not_a_budget() -> None:
    assert parse_match("trainable") is None
    assert make_study(None, ("lora",), 1, ()).study.budget is None
    assert make_study(None, ("lora",), 1, (), match="none").study.match is None


@pytest.mark.parametrize("text", WRONG)
def test_an_invalid_match_says_what_to_write(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_match(text)
    assert text.split("=")[0] in str(caught.value) and WRONG[text] in (caught.value.fix or "")


def test_an_invalid_match_names_its_line_or_option(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for text in ("peak=2GB", "seconds=600", "peak=-1"):
        path.write_text(f"methods: [lora]\nseeds: [1]\nmatch: {text}\n", encoding="utf-8")
        outcome = cli("compare", "s.yaml", "--dry-run")
        assert outcome.code == 2 and "s.yaml:3 match" in outcome.flat, outcome.err
        assert WRONG[text].split()[-1] in outcome.flat
        outcome = cli("compare", "--methods", "lora", "--match", text, "--dry-run")
        assert outcome.code == 2 and "command line match" in outcome.flat, outcome.err
    for other in ("12", "{peak: 2GiB}", "[trainable]"):
        path.write_text(f"methods: [lora]\nmatch: {other}\n", encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_study(path)
        (problem,) = caught.value.problems
        assert problem.line == 2 and "expected a text" in problem.what


def test_the_option_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("methods: [lora]\nmatch: peak=2GiB\n", encoding="utf-8")
    written, given = load_study(path), load_study(path, match="peak=3GiB")
    assert written.study.match == "peak=2GiB" and written.match_place.line == 2
    assert given.study.match == "peak=3GiB" and given.match_place.file == "command line"


def test_unmatched_rows_keep_their_settings(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "methods:\n  - {method: lora, matched: false}\n  - {label: as, method: lora}\n"
        "settings: {method: {density: 0.02}}\nseeds: [1]\n",
        encoding="utf-8",
    )
    found = {c.label: c.loaded.recipe for c in load_study(path).cells}
    assert found["lora"].match is None and found["as"].match == "trainable"
    outside, inside = found["lora"].method, found["as"].method
    assert isinstance(outside, LoraSettings) and isinstance(inside, LoraSettings)
    assert (outside.density, inside.density) == (None, 0.02)


# --- method.entries


def test_entries_replace_the_density() -> None:
    plain = load_recipe(None).recipe
    counted = load_recipe(None, ("method={name: sparsegrad, entries: 500}",)).recipe
    assert isinstance(plain.method, SparsegradSettings)
    assert isinstance(counted.method, SparsegradSettings)
    assert (plain.method.density, plain.method.entries) == (0.01, None)
    assert (counted.method.density, counted.method.entries) == (None, 500)
    assert digest(plain) != digest(counted)
    # The stronger setting replaces the density of the quickstart.
    assert load_recipe(None, ("method.entries=500",)).recipe == counted
    back = load_recipe(None, ("method.entries=500", "method.density=0.01"))
    assert back.recipe == plain


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.density=null",),
        ("method={name: meprop, density: 0.1, entries: 5}",),
        ("method.entries=0",),
        ("method={name: lora, entries: 5}",),
    ],
)
def test_density_with_entries_or_neither_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError):
        load_recipe(None, overrides)


def test_a_recipe_in_entries_matches_sparse_methods(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: {name: sparsegrad, entries: 700}\n", encoding="utf-8")
    found = make_study(str(recipe), ("meprop", "sparsegrad"), 1, ())
    for cell in found.cells:
        method = cell.loaded.recipe.method
        assert isinstance(method, MepropSettings | SparsegradSettings)
        assert (method.entries, method.density) == (700, None)
    with pytest.raises(RecipeError, match="entries"):
        make_study(str(recipe), ("lora",), 1, ())
