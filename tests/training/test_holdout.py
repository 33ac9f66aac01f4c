"""task.holdout: held-out training rows choose the model, and the validation data is a test set."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from support.small_runs import ROWS, answers, base_folder, data_folder, record, sentences, train
from support.task_data import load_task

from sparsegrad_cli.errors import DataError, RecipeError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.restore.restore import load_trained
from sparsegrad_cli.restore.run_files import open_run
from sparsegrad_cli.run.test_answers import read_answers


def rows_of(data: object) -> list[str]:
    return list(data["text"])  # type: ignore[index]


def test_held_out_rows_are_training_rows_and_the_same_for_every_seed(tmp_path: Path) -> None:
    folder = data_folder(tmp_path)
    every = [text for text, _ in sentences(1, 48)]
    task = load_task("csv", path=folder, holdout=10)
    held = rows_of(task.validation["holdout"])
    assert len(held) == 10
    assert sorted(held + rows_of(task.train)) == sorted(every)
    assert rows_of(task.test["validation"]) == [text for text, _ in sentences(2, ROWS)]
    again = load_task("csv", path=folder, holdout=10)
    assert rows_of(again.validation["holdout"]) == held
    assert any("10 of 48 training rows are held out" in note for note in task.notes)


def test_a_share_is_rounded_and_unused_rows_are_those_that_train_limit_leaves(
    tmp_path: Path,
) -> None:
    folder = data_folder(tmp_path)
    task = load_task("csv", path=folder, holdout=0.25, train_limit=20, test_unused=9)
    assert len(task.validation["holdout"]) == 12
    assert len(task.train) == 20
    unused = rows_of(task.test["unused"])
    assert len(unused) == 9
    assert not set(unused) & set(rows_of(task.train) + rows_of(task.validation["holdout"]))


def test_the_majority_answer_is_measured_on_the_test_set(tmp_path: Path) -> None:
    task = load_task("csv", path=data_folder(tmp_path), holdout=10)
    labels = list(task.test["validation"]["label"])
    usual = round(sum(task.train["label"]) / len(task.train))
    assert task.majority["accuracy"] == labels.count(usual) / len(labels)


@pytest.mark.parametrize("count", [48, 100, 0.001])
def test_too_many_or_no_rows_to_hold_out_are_refused(tmp_path: Path, count: float) -> None:
    with pytest.raises(DataError, match="expected 1 to 47 of the 48 training rows to hold out"):
        load_task("csv", path=data_folder(tmp_path), holdout=count)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("task.test_unused=3", "task.test_unused"),
        ("task={holdout: 9, test_unused: 3}", "task.test_unused"),
        ("task={name: csv, mix: [a.csv, b.csv], holdout: 9}", "task.holdout"),
        ("task={name: chat, path: d.jsonl, holdout: 9}", "task.holdout"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: str, key: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(None, (settings,))
    assert key in [problem.key for problem in raised.value.problems]


def test_the_kept_model_is_tested_once_and_its_answers_are_written(tmp_path: Path) -> None:
    """Held-out rows choose; score and loss of the test are those of the restored model."""
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    run = train(
        tmp_path / "run",
        base,
        data,
        "task.holdout=12",
        "method=lora",
        "train.load_best_model_at_end=true",
        "train.save_strategy=best",
    )
    kept = record(run)
    assert kept["task"]["validation_examples"] == {"holdout": 12}
    assert kept["task"]["test_examples"] == {"validation": ROWS}
    metrics = kept["metrics"]
    assert all(set(one["values"]) == {"holdout"} for one in metrics["history"])
    test = metrics["test"]
    assert test["step"] == metrics["best"]["step"]
    trained = load_trained(open_run(run), 1)
    logits, loss = answers(trained.setup.model, trained.setup.tokenizer)
    predicted = logits.argmax(1)
    labels = torch.tensor([["high", "low"].index(label) for _, label in sentences(2, ROWS)])
    assert test["score"] == pytest.approx(float((predicted == labels).float().mean()))
    assert test["loss"] == pytest.approx(loss, rel=1e-5)
    found = read_answers(run)
    assert list(found) == ["validation"]
    assert [answer.prediction for answer in found["validation"]] == predicted.tolist()
    assert [answer.label for answer in found["validation"]] == labels.tolist()


def test_a_resumed_run_tests_as_one_that_never_stopped(tmp_path: Path) -> None:
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    settings = ("task.holdout=12", "method=lora", "train.save_strategy=steps", "train.save_steps=3")
    whole = train(tmp_path / "whole", base, data, *settings)
    run = train(tmp_path / "run", base, data, *settings, stop=True)
    train(tmp_path / "run", base, data, *settings, resume=True)
    assert (run / "test.csv").read_bytes() == (whole / "test.csv").read_bytes()
    assert record(run)["metrics"]["test"] == record(whole)["metrics"]["test"]


def test_several_labels_are_tested_at_the_threshold_of_the_held_out_rows(tmp_path: Path) -> None:
    base, data = base_folder(tmp_path / "base"), tmp_path / "data"
    data.mkdir()
    for name, seed, count in (("train", 1, 48), ("validation", 2, ROWS)):
        with (data / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for text, _ in sentences(seed, count):
                labels = ["early"] * (text[0] < "n") + ["late"] * (text[-1] >= "n")
                writer.writerow((text, "|".join(labels)))
    run = train(
        tmp_path / "run",
        base,
        data,
        "task.type=multilabel",
        "task.label_separator='|'",
        "task.holdout=12",
        "method=lora",
    )
    metrics = record(run)["metrics"]
    assert metrics["test"]["threshold"] == metrics["best"]["threshold"]
    with (run / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    true = [set(row["label"].split()) for row in rows]
    given = [set(row["prediction"].split()) for row in rows]
    right = sum(len(a & b) for a, b in zip(true, given, strict=True))
    f1 = 2 * right / (sum(map(len, true)) + sum(map(len, given)))
    assert metrics["test"]["values"]["validation"]["f1_micro"] == pytest.approx(f1)
