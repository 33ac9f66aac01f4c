"""Training settings that cannot work are refused early, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsegrad_cli.errors import RecipeError, UsageError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.tasks.precision import check_autocast
from sparsegrad_cli.tasks.task import load_classification

STEPS = ("train.eval_strategy=steps", "train.eval_steps=2")
BEST = (
    "save_strategy: best saves every best model; with load_best_model_at_end: false the run ends "
    "with its last model"
)
LOST = "saves no checkpoint at some evaluations"


def written(folder: Path, train: str, more: str = "") -> Path:
    path = folder / "r.yaml"
    path.write_text(f"method: lora\ntrain:\n  use_cpu: true\n{train}{more}")
    return path


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (
            "  eval_strategy: steps\n  eval_steps: 2\n  save_strategy: epoch\n",
            f"6: train.save_strategy 'epoch' {LOST} (eval_strategy is 'steps')",
        ),
        (
            "  eval_strategy: epoch\n  eval_steps: 2\n  save_strategy: steps\n",
            f"6: train.save_strategy 'steps' {LOST} (eval_strategy is 'epoch')",
        ),
        # transformers accepts a multiple, but then the best model may not be saved.
        (
            "  eval_strategy: steps\n  eval_steps: 1\n  save_steps: 6\n",
            f"6: train.save_steps 6 {LOST} (eval_steps is 1)",
        ),
        (
            "  eval_strategy: steps\n  eval_steps: 100\n  save_steps: 150\n",
            f"6: train.save_steps 150 {LOST} (eval_steps is 100)",
        ),
    ],
)
def test_best_model_needs_a_checkpoint_at_every_evaluation(
    tmp_path: Path, train: str, expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, train))
    (problem,) = caught.value.problems
    assert f"{problem.file}:{problem.line}: {problem.key} {problem.what}" == (
        f"{tmp_path / 'r.yaml'}:{expected}, so the best model may be lost"
    )
    assert problem.fix == BEST
    for alternative in ("train.save_strategy=best", "train.load_best_model_at_end=false"):
        load_recipe(tmp_path / "r.yaml", (alternative,))


def test_labels_that_are_scores_are_not_smoothed(tmp_path: Path) -> None:
    """For stsb it is known in advance; for a file, after reading it and before loading a model."""
    smoothed = "  label_smoothing_factor: 0.1\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, smoothed, "task: glue/stsb\n"))
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("train.label_smoothing_factor", 4)
    assert "scores" in problem.what and problem.fix == "leave it out"
    rows = "".join(f"text {n},{n / 7}\n" for n in range(40))
    (tmp_path / "scores.csv").write_text("text,label\n" + rows)
    task = f"model: nobody/none\ntask: {{name: csv, path: {tmp_path / 'scores.csv'}}}\n"
    with pytest.raises(UsageError, match="the labels of this task are scores") as found:
        load_classification(load_recipe(written(tmp_path, smoothed, task)))
    assert found.value.where == f"{tmp_path / 'r.yaml'}:4: train.label_smoothing_factor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("overrides", [("fp16=true",), ("use_cpu=true", "fp16=true")])
def test_autocast_that_this_machine_lacks_is_refused(overrides: tuple[str, ...]) -> None:
    settings = ("model=nobody/none", *(f"train.{text}" for text in overrides))
    with pytest.raises(UsageError, match="GPU") as caught:
        check_autocast(load_recipe(None, settings))
    assert str(caught.value.where).endswith(f": train.{overrides[-1].removesuffix('=true')}")


def test_autocast_that_every_machine_has_is_accepted() -> None:
    for overrides in ((), ("train.bf16=true", "train.use_cpu=true"), ("train.bf16=true",)):
        check_autocast(load_recipe(None, overrides))


@pytest.mark.parametrize("weight", ["1e300", "1e-300", "3.5e38", "1e-39"])
def test_class_weights_that_float32_cannot_hold_are_refused(weight: str) -> None:
    with pytest.raises(RecipeError, match="which float32 can hold"):
        load_recipe(None, (f"train.class_weights={{good: {weight}}}",))
    assert load_recipe(None, ("train.class_weights={good: 1e38}",)).recipe.train.class_weights
