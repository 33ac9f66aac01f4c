"""Recipes that differ in more than the method are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_runs import SMALL, Cli
from support.paths import REPO

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe.study import LoadedStudy, load_study, make_study
from sparsegrad_cli.study.parity import check_parity, differences


def study(folder: Path, text: str) -> LoadedStudy:
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return load_study(path)


ODD = (
    "methods:\n"
    "  - {label: full, method: full, train: {learning_rate: 1e-4}}\n"
    "  - {label: lora, method: lora, train: {learning_rate: 2e-3, warmup_steps: 3}}\n"
    "  - {label: core, method: sparsegrad, calibration: {basis_per: kind}}\n"
    "seeds: [1, 2]\n"
)


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_differ_in_methods_only(path: Path) -> None:
    parity = check_parity(load_study(path)).to_json()
    # LoRA on all linear layers is a row of its own, which the report flags.
    flagged = {"targets.modules"} if path.stem in ("nearest_rivals", "protocol_minilm") else set()
    assert {difference["key"] for difference in parity["flagged"]} == flagged
    assert parity["compared"] > 40


def test_a_setting_of_one_method_is_refused_with_key_values_and_fix(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_parity(study(tmp_path, ODD))
    (problem,) = caught.value.problems
    assert problem.key == "train.warmup_steps" and problem.file == str(tmp_path / "s.yaml")
    assert "lora 3.0, all others 0.06" in problem.what
    assert "differ: [train.warmup_steps]" in str(problem.fix)


def test_an_allowed_difference_is_flagged(tmp_path: Path) -> None:
    parity = check_parity(study(tmp_path, ODD + "differ: [train.warmup_steps]\n")).to_json()
    (flagged,) = parity["flagged"]
    assert flagged["key"] == "train.warmup_steps"
    assert flagged["values"] == {"full": 0.06, "lora": 3.0, "core": 0.06}
    (rates,) = parity["declared"]
    assert rates["values"] == {"full": 1e-4, "lora": 2e-3, "core": 1e-3}
    assert rates["task"] == "builtin:acceptability"


def test_all_differences_are_reported_together(tmp_path: Path) -> None:
    text = (
        "methods:\n"
        "  - {method: full, train: {weight_decay: 0.1}}\n"
        "  - {method: lora, train: {bf16: true}}\n"
        "tasks:\n"
        "  - {name: builtin:acceptability, methods: {lora: {max_steps: 7}}}\n"
        "seeds: [1]\n"
        "differ: [train.max_step, train.weight_decay, nonsense]\n"
    )
    with pytest.raises(RecipeError) as caught:
        check_parity(study(tmp_path, text))
    said = {problem.key: problem for problem in caught.value.problems}
    assert set(said) == {"differ", "train.bf16", "train.max_steps"}
    unknown = [problem for problem in caught.value.problems if problem.key == "differ"]
    assert "did you mean train.max_steps?" in str(unknown[0].fix) and "nonsense" in unknown[1].what
    assert "full False, lora True" in said["train.bf16"].what


def test_rates_that_differ_in_the_last_digit_are_a_difference(tmp_path: Path) -> None:
    text = (
        "methods:\n"
        "  - {method: full, train: {weight_decay: 0.10000001}}\n"
        "  - {method: lora, train: {weight_decay: 0.1}}\n"
    )
    (found,) = differences(study(tmp_path, text))
    assert found.text() == "full 0.10000001, lora 0.1"


def test_a_head_warmed_up_for_one_method_only_is_refused(tmp_path: Path) -> None:
    both = make_study(None, ("lora", "sparsegrad"), 1, ("calibration.keep_head=true",))
    with pytest.raises(RecipeError, match=r"lora cold, sparsegrad 50 steps at 0\.001"):
        check_parity(both)
    alone = make_study(None, ("sparsegrad",), 1, ("calibration.keep_head=true",))
    assert check_parity(alone).flagged == []
    # The core form warms up the head by default and undoes it: that is calibration.
    plain = make_study(None, ("lora", "sparsegrad"), 1, ())
    parity = check_parity(plain).to_json()
    assert parity["compared"] > 40 and parity["declared"] == parity["flagged"] == []


def test_compare_refuses_before_it_changes_any_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(ODD, encoding="utf-8")
    kept = tmp_path / "c" / "cells" / "precious"
    kept.mkdir(parents=True)
    for command in (
        ("compare", "s.yaml", "-o", "c", "--overwrite", *SMALL),
        ("compare", "s.yaml", "-o", "new", *SMALL),
        ("validate", "s.yaml"),
    ):
        outcome = cli(*command)
        assert outcome.code == 2 and "train.warmup_steps" in outcome.flat, outcome.err
    assert kept.is_dir() and not (tmp_path / "new").exists()
    (tmp_path / "s.yaml").write_text(ODD + "differ: [train.warmup_steps]\n", encoding="utf-8")
    assert cli("validate", "s.yaml").code == 0
