"""`sparsegrad predict`, `evaluate` and `export` of a model that gives several labels a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, f1_score
from support.cli_runs import Cli
from support.small_runs import base_folder, record, sentences, train

NAMES = ("early", "late", "short")


def labels_of(text: str) -> list[str]:
    """Return which halves of the alphabet a text begins and ends in, and whether it is short."""
    found = ["early"] if text[0] < "n" else []
    found += ["late"] if text[-1] >= "n" else []
    return found + (["short"] if len(text) < 6 else [])


def write(path: Path, seed: int, count: int, *, columns: bool = False) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *NAMES] if columns else ["text", "tags"])
        for text, _ in sentences(seed, count):
            labels = labels_of(text)
            flags = [int(name in labels) for name in NAMES]
            writer.writerow([text, *flags] if columns else [text, "|".join(labels)])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "data").mkdir()
    write(folder / "data" / "train.csv", 1, 48)
    write(folder / "data" / "validation.csv", 2, 24)
    return train(
        folder / "run",
        base_folder(folder / "base"),
        folder / "data",
        "method.density=0.05",
        "method.rank=7",
        "task.type=multilabel",
        "task.columns.label=tags",
        "task.label_separator='|'",
        "train.class_weights=balanced",
        "calibration.warmup_steps=2",
        "train.load_best_model_at_end=true",
        # After fewer or larger steps, it may give every row the same labels.
        "train.max_steps=30",
        "train.learning_rate=1e-2",
        "train.eval_steps=10",
    )


def probabilities(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[float(row[f"probability_{name}"]) for name in NAMES] for row in rows])


def test_the_record_says_what_was_learnt(run: Path) -> None:
    found = record(run)
    assert found["task"]["kind"] == "multilabel" and found["task"]["label_names"] == list(NAMES)
    true = np.array([[n in labels_of(t) for n in NAMES] for t, _ in sentences(1, 48)])
    balanced = [(48 - n) / n for n in true.sum(axis=0)]
    assert list(found["task"]["class_weights"].values()) == pytest.approx(balanced)
    best = found["metrics"]["best"]
    assert set(best["values"]["validation"]) == {
        *("f1_micro", "f1_macro", "exact_match", "average_precision"),
    }
    assert best["metric"] == "f1_micro" and 0 < best["threshold"] < 1
    history = [e["score"] for e in found["metrics"]["history"] if e["step"] > 0]
    assert best["score"] == max(history)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_get_every_label_over_the_threshold(
    suffix: str, run: Path, cli: Cli, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "new.csv", 5, 30), tmp_path / f"out{suffix}"
    ended = cli("predict", str(run), str(source), "-o", str(target), "-p")
    assert ended.code == 0, ended.err
    rows: list[dict[str, Any]]
    if suffix == ".parquet":
        rows = pq.read_table(target).to_pylist()
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    else:
        with target.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row |= {name: json.loads(row[name]) for name in ("prediction", "probability")}
    threshold = record(run)["metrics"]["best"]["threshold"]
    values = probabilities(rows)
    for row, own in zip(rows, values, strict=True):
        given = [(n, v) for n, v in zip(NAMES, own.tolist(), strict=True) if v >= threshold]
        assert row["prediction"] == [name for name, _ in given]
        assert row["probability"] == pytest.approx([value for _, value in given])
    assert len({tuple(row["prediction"]) for row in rows}) > 1


def test_texts_show_labels_with_their_probabilities(run: Path, cli: Cli) -> None:
    texts = [text for text, _ in sentences(5, 12)]
    rows = [
        json.loads(line)
        for line in cli("predict", str(run), *texts, "--json").out.split("\n")
        if line
    ]
    lines = cli("predict", str(run), *texts).out.strip().split("\n")
    for row, line in zip(rows, lines, strict=True):
        labels, shown, text = line.split("\t")
        assert labels == (", ".join(row["prediction"]) or "-") and text == row["text"]
        assert shown == (", ".join(f"{p:.3f}" for p in row["probability"]) or "-")


@pytest.mark.parametrize("form", ["merged", "adapter", "lora"])
def test_exports_keep_labels_and_threshold(form: str, run: Path, cli: Cli, tmp_path: Path) -> None:
    source, folder = write(tmp_path / "new.csv", 5, 30), tmp_path / form
    made = cli("export", str(run), "--to", form, "--output-dir", str(folder), "--quiet")
    assert made.code == 0, made.err
    options = (str(source), "-q", "-p")
    own, exported = (cli("predict", str(of), *options).out for of in (run, folder))
    first, second = (list(csv.DictReader(text.splitlines())) for text in (own, exported))
    assert [row["prediction"] for row in first] == [row["prediction"] for row in second]
    assert probabilities(first) == pytest.approx(probabilities(second), abs=1e-4)
    if form == "merged":
        config = json.loads((folder / "config.json").read_text())
        assert config["problem_type"] == "multi_label_classification"
        assert config["label_threshold"] == record(run)["metrics"]["best"]["threshold"]


def test_numbers_of_an_evaluation_are_those_of_the_formulas(
    run: Path, cli: Cli, tmp_path: Path
) -> None:
    source = write(tmp_path / "test.csv", 5, 40)
    flags = write(tmp_path / "flags.csv", 5, 40, columns=True)
    options = ("--json", "--worst", "3", "--resamples", "20")
    found = json.loads(cli("evaluate", str(run), str(source), *options).out)
    ended = cli("predict", str(run), str(source), "-q", "-p")
    rows = list(csv.DictReader(ended.out.splitlines()))
    values, threshold = probabilities(rows), record(run)["metrics"]["best"]["threshold"]
    true = np.array([[n in labels_of(t) for n in NAMES] for t, _ in sentences(5, 40)], dtype=int)
    given = (values >= threshold).astype(int)
    metrics = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert found["threshold"] == threshold
    assert metrics == {
        "f1_micro": pytest.approx(f1_score(true, given, average="micro")),
        "f1_macro": pytest.approx(f1_score(true, given, average="macro", zero_division=0)),
        "exact_match": pytest.approx((true == given).all(axis=1).mean()),
        "average_precision": pytest.approx(average_precision_score(true, values)),
    }
    low, high = found["metrics"]["f1_micro"]["interval"]
    assert low <= metrics["f1_micro"] <= high
    assert found["confusion"] == []
    by_name = {each["name"]: each for each in found["classes"]}
    assert by_name["late"]["rows"] == true[:, 1].sum()
    assert by_name["late"]["predicted"] == given[:, 1].sum()
    own = average_precision_score(true[:, 1], values[:, 1])
    assert by_name["late"]["average_precision"] == pytest.approx(own)
    losses = -(true * np.log(values) + (1 - true) * np.log(1 - values)).mean(axis=1)
    assert found["loss"] == pytest.approx(losses.mean(), abs=1e-3)
    wrong = [n for n in np.argsort(-losses) if (true[n] != given[n]).any()][:3]
    assert [w["place"] for w in found["worst"]] == [f"{source}:{n + 2}" for n in wrong]
    labels = ", ".join(labels_of(sentences(5, 40)[wrong[0]][0])) or "-"
    assert found["worst"][0]["label"] == labels
    by_flags = json.loads(cli("evaluate", str(run), str(flags), *options).out)
    assert by_flags["metrics"] == found["metrics"]
    folder = tmp_path / "report"
    shown = cli("evaluate", str(run), str(source), "--resamples", "0", "-o", str(folder))
    assert "How well each label is found" in shown.out and "micro F1" in shown.out
    assert "a label is predicted if its probability is at least 0." in " ".join(shown.out.split())
    page = (folder / "report.html").read_text()
    assert "By label" in page and "Confusion matrix" not in page


def test_unknown_labels_and_columns_are_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,tags\nabc,early|soon\n")
    refused = cli("evaluate", str(run), str(bad))
    assert (refused.code, "the label 'soon' is not a class" in refused.flat) == (2, True)
    bad.write_text("text,other\nabc,early\n")
    refused = cli("evaluate", str(run), str(bad))
    assert (refused.code, "nor a column of 0 and 1 for each of early" in refused.flat) == (2, True)
