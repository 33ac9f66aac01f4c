"""task.type, task.metric and task.positive_label are checked against the task, before any data."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_runs import Cli

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe

CSV = ("task.name=csv", "task.path=data.csv")


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (("task=glue/stsb", "task.type=regression"), "task.type", "glue/stsb is a task of scores"),
        (("task=glue/rte", "task.type=regression"), "task.type", "glue/rte is a task of classes"),
        (("task=builtin:acceptability", "task.type=classification"), "task.type", "no effect"),
        (("task=oasst", "task.type=classification"), "task.type", "a task of conversations"),
        ((*CSV, "task.type=ranking"), "task.type", "is not one of 'classification'"),
        ((*CSV, "task.type=regression", "task.metric=f1"), "task.metric", "of classification"),
        ((*CSV, "task.type=classification", "task.metric=pearson"), "task.metric", "of regression"),
        ((*CSV, "task.metric=f1_makro"), "task.metric", "did you mean f1_macro"),
        (("task=glue/rte", "task.metric=pearson"), "task.metric", "not a metric for a task with"),
        (("task=oasst", "task.metric=accuracy"), "task.metric", "not a metric of conversations"),
        ((*CSV, "task.positive_label=a"), "task.positive_label", "no effect on the default"),
        ((*CSV, "task.metric=pearson", "task.positive_label=a"), "task.positive_label", "pearson"),
        (("task=oasst", "task.positive_label=a"), "task.positive_label", "no effect on loss"),
        (("task=glue/cola", "task.positive_label=acceptable"), "task.positive_label", "no effect"),
        (("task=glue/mrpc", "task.positive_label=no"), "task.positive_label", "not_equivalent"),
        (
            ("task=glue/mnli", "task.metric=f1", "task.positive_label=neutral"),
            "task.positive_label",
            "is for two classes",
        ),
        (
            (*CSV, "task.type=regression", "train.label_smoothing_factor=0.1"),
            "train.label_smoothing_factor",
            "labels of this task are scores",
        ),
        (
            (*CSV, "task.metric=pearson", "train.label_smoothing_factor=0.1"),
            "train.label_smoothing_factor",
            "labels of this task are scores",
        ),
    ],
)
def test_validate_refuses_task_settings_without_effect(
    cli: Cli, tmp_path: Path, settings: tuple[str, ...], key: str, message: str
) -> None:
    (tmp_path / "data.csv").write_text("text,label\na,0\nb,1\n")
    outcome = cli("validate", *settings)
    assert outcome.code == 2 and key in outcome.flat and message in outcome.flat


@pytest.mark.parametrize(
    "settings",
    [
        ("task=glue/mrpc", "task.positive_label=not_equivalent"),
        ("task=glue/cola", "task.metric=recall", "task.positive_label=unacceptable"),
        ("task=glue/mnli", "task.metric=f1_weighted"),
    ],
)
def test_task_settings_with_an_effect_are_accepted(settings: tuple[str, ...]) -> None:
    assert load_recipe(None, settings).recipe.task.name.startswith("glue/")


@pytest.mark.parametrize("label", ["no", "yes", "01", "1", "1.10", "true", "1_000"])
def test_a_positive_label_is_read_as_text(tmp_path: Path, label: str) -> None:
    (tmp_path / "data.csv").write_text("text,label\na,0\nb,1\n")
    recipe = tmp_path / "recipe.yaml"
    task = f"{{name: csv, path: data.csv, metric: f1, positive_label: {label}}}"
    recipe.write_text(f"task: {task}\n")
    assert load_recipe(recipe).recipe.task.positive_label == label
    overrides = (f"task.positive_label={label}",)
    assert load_recipe(recipe, overrides).recipe.task.positive_label == label
    assert load_recipe(recipe, ("task.positive_label=null",)).recipe.task.positive_label is None


def test_a_list_is_not_a_label() -> None:
    with pytest.raises(RecipeError, match="positive_label"):
        load_recipe(None, ("task=glue/mrpc", "task.positive_label=[a]"))


def test_task_settings_change_the_digest_only_if_set() -> None:
    plain = load_recipe(None, ("task=glue/mrpc",)).recipe
    chosen = load_recipe(None, ("task=glue/mrpc", "task.positive_label=not_equivalent")).recipe
    assert digest(plain) != digest(chosen)
