"""Several labels a row: how files hold them, what is refused, metrics and the threshold."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score

from sparsegrad_cli.data.examples import finish
from sparsegrad_cli.data.load_task import read_task
from sparsegrad_cli.data.metrics import mean_loss, score
from sparsegrad_cli.data.multilabel_metrics import choose_threshold, cross_fitted
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import MULTILABEL_METRICS, TaskSpec, check_settings

ROWS = [("one", ["b", "a"]), ("two", []), ("three", ["c"]), ("four", ["a", "c"])] * 5
NAMES = ("a", "b", "c")


def task(path: Path, name: str = "csv", **settings: Any) -> TaskSection:
    return TaskSection.model_validate(
        {"name": name, "path": str(path), "type": "multilabel", **settings}
    )


def write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    quoted = [",".join(f'"{str(cell).replace(chr(34), 2 * chr(34))}"' for cell in r) for r in rows]
    path.write_text("\n".join([",".join(header), *quoted]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["json", "python", "separator", "columns", "jsonl", "parquet"])
def test_every_way_of_holding_labels_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    path, name = tmp_path / "data.csv", "csv"
    if form == "jsonl":
        path, name = tmp_path / "data.jsonl", "json"
        path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in ROWS))
    elif form == "parquet":
        path, name = tmp_path / "data.parquet", "parquet"
        pq.write_table(pa.Table.from_pylist([{"text": t, "label": v} for t, v in ROWS]), path)
    elif form == "columns":
        flags = [[t, *(int(name in v) for name in NAMES)] for t, v in ROWS]
        write(path, ["text", *NAMES], flags)
        settings = {"columns": {"labels": NAMES}}
    elif form == "separator":
        write(path, ["text", "label"], [[t, "; ".join(v)] for t, v in ROWS])
        settings = {"label_separator": ";"}
    else:
        text = json.dumps if form == "json" else str
        write(path, ["text", "label"], [[t, text(v)] for t, v in ROWS])
    section = task(path, name, **settings)
    raw = read_task(section)
    assert raw.spec.label_names == NAMES and raw.spec.metrics == MULTILABEL_METRICS
    assert (raw.spec.kind, raw.spec.metric) == ("multilabel", "f1_micro")
    both = [
        (text, label)
        for part in (raw.train, raw.validation["validation"])
        for text, label in zip(part.text, part.label, strict=True)
    ]
    assert sorted(both) == sorted((t, [float(n in v) for n in NAMES]) for t, v in ROWS)
    assert "5 of 20 rows have none of the labels" in raw.notes
    data = finish(raw, section)
    assert data.train["label"][0] == raw.train.label[0]
    assert set(data.majority) == set(MULTILABEL_METRICS)
    assert "the highest micro F1 on all rows of validation; scores are cross-f" in data.notes[-1]


def test_lists_of_class_ids_are_read_by_name(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["x", "y"]))})
    rows = {"text": ["a", "b", "c"], "label": [[1], [], [0, 1]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "validation.parquet")
    raw = read_task(task(tmp_path, "parquet"))
    assert raw.spec.label_names == ("x", "y")
    assert raw.train.label == [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("rows", "settings", "says"),
    [
        ([["t", "a;b"]], {}, "'a;b'): expected a list of labels"),
        ([["t", ""]], {}, "missing: write []"),
        ([["t", '["a", ["b"]]']], {}, "a list that holds ['b']: expected words or numbers"),
        ([["t", '[["a"]]']], {}, "a list that holds ['a']: expected words or numbers"),
        ([["t", '["a"]']], {}, "every label is 'a'"),
        ([["t", "[]"]], {}, "no training row has a label"),
        ([["t", "2"]], {"columns": {"labels": ("label", "text2")}}, "no column 'text2'"),
    ],
)
def test_unusable_labels_are_refused(
    rows: list[list[str]], settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.csv", ["text", "label"], rows * 3)
    with pytest.raises(SparsegradError) as caught:
        read_task(task(path, **settings))
    assert says in str(caught.value)
    # The type is set already, and one label of lists cannot be read without it.
    assert caught.value.fix and "task.type: multilabel" not in str(caught.value)
    assert "for one class a row" not in caught.value.fix


def test_a_label_that_training_lacks_names_its_set(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", ["text", "label"], [["t", '["a", "b"]']] * 3)
    other = write(tmp_path / "other.csv", ["text", "label"], [["t", '["c"]']])
    with pytest.raises(SparsegradError, match="'c' occurs in ood but not in training"):
        read_task(task(train, evaluation={"ood": str(other)}))


def test_validation_labels_without_training_labels(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ["text", "label"], [["t", "[]"]] * 3)
    write(tmp_path / "validation.csv", ["text", "label"], [["t", '["a"]']])
    with pytest.raises(SparsegradError, match="no training row has a label"):
        read_task(task(tmp_path))
    flags = write(tmp_path / "flags.csv", ["text", "a", "b"], [["t", 0, 0]] * 3)
    with pytest.raises(SparsegradError, match="no training row has a label"):
        read_task(task(flags, columns={"labels": ("a", "b")}))


def test_a_set_without_labels_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ["text", "label"], [["t", '["a", "b"]'], ["u", '["b"]']])
    write(tmp_path / "validation.csv", ["text", "label"], [["t", "[]"]])
    other = write(tmp_path / "other.csv", ["text", "label"], [["t", '["b"]']])
    raw = read_task(task(tmp_path, evaluation={"ood": str(other)}))
    found = [note for note in raw.notes if "F1 is 0" in note]
    assert found == ["no row of validation has a label: its F1 is 0 whatever the model predicts"]


def test_a_flag_that_is_not_0_or_1_is_refused_with_its_column(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", ["text", "a", "b"], [["t", 1, 0], ["u", 1, 2]])
    with pytest.raises(SparsegradError) as caught:
        read_task(task(path, columns={"labels": ("a", "b")}))
    assert "the label is '2': expected 0 or 1, in column 'b'" in str(caught.value)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize(
    ("settings", "key", "says"),
    [
        ({"type": None, "metric": "f1_micro"}, "task.metric", "of rows with several labels"),
        ({"metric": "accuracy"}, "task.metric", "accuracy is a metric of classification"),
        ({"type": None, "label_separator": ";"}, "task.label_separator", "several labels"),
        ({"type": None, "columns": {"labels": ("a", "b")}}, "task.columns.labels", "several"),
        ({"columns": {"labels": ("a",)}}, "task.columns.labels", "got 1"),
        ({"columns": {"labels": ("a", "a")}}, "task.columns.labels", "got 'a' twice"),
        ({"columns": {"labels": ("a", "b"), "label": "c"}}, "task.columns.label", "no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], key: str, says: str
) -> None:
    with pytest.raises(SparsegradError) as caught:
        check_settings(task(Path("data.csv"), **settings))
    assert caught.value.where == key and says in caught.value.what


# --- metrics


def spec(count: int) -> TaskSpec:
    names = tuple(f"l{number}" for number in range(count))
    metrics = MULTILABEL_METRICS
    return TaskSpec("t", ("text",), "label", names, False, metrics[0], metrics, multilabel=True)


def micro_f1(answers: np.ndarray, true: np.ndarray) -> float:
    hits = float((answers * true).sum())
    return 2 * hits / float(answers.sum() + true.sum())


def test_metrics_and_loss_follow_their_formulas() -> None:
    draw = np.random.default_rng(0)
    logits, true = draw.normal(size=(40, 3)), draw.integers(0, 2, size=(40, 3))
    found = score(spec(3), logits, true)
    probabilities = 1 / (1 + np.exp(-logits))
    answers = np.zeros_like(true)
    for own in (0, 1):  # each half at the threshold that is best on the other half
        other = probabilities[1 - own :: 2], true[1 - own :: 2]
        tried = {t: micro_f1(other[0] >= t, other[1]) for t in np.unique(other[0])}
        chosen = choose_threshold(*other)
        assert micro_f1(other[0] >= chosen, other[1]) == pytest.approx(max(tried.values()))
        answers[own::2] = probabilities[own::2] >= chosen
    assert (cross_fitted(probabilities, true) == answers).all()
    macro = np.mean([micro_f1(answers[:, c], true[:, c]) for c in range(3)])
    precision = np.mean([average_precision_score(true[:, c], logits[:, c]) for c in range(3)])
    assert found.values == {
        "f1_micro": pytest.approx(micro_f1(answers, true)),
        "f1_macro": pytest.approx(macro),
        "exact_match": pytest.approx((answers == true).all(axis=1).mean()),
        "average_precision": pytest.approx(precision),
    }
    assert found.threshold == choose_threshold(probabilities, true)
    weights = np.array([1.0, 2.0, 0.5])
    own = true * weights * np.log(probabilities) + (1 - true) * np.log(1 - probabilities)
    assert mean_loss(spec(3), logits, true, weights=weights) == pytest.approx(-own.mean())


def test_the_threshold_lies_between_two_probabilities() -> None:
    probabilities = np.array([[0.1, 0.3], [0.35, 0.2]])
    true = np.array([[0, 1], [1, 0]])
    assert choose_threshold(probabilities, true) == pytest.approx(0.25)
    assert choose_threshold(probabilities * 3, true) == pytest.approx(0.75)
    # 0.5 itself is taken where it separates the labels as well.
    assert choose_threshold(np.array([[0.2, 0.9]]), np.array([[0, 1]])) == 0.5
    assert choose_threshold(probabilities, np.zeros((2, 2))) == 0.5
    values = sorted({*probabilities.ravel()})
    assert any(low < 0.25 < high for low, high in pairwise(values))


def test_a_label_of_no_row_is_left_out_with_a_note() -> None:
    logits, true = np.array([[2.0, -1.0], [-2.0, -1.0]]), np.array([[1, 0], [0, 0]])
    found = score(spec(2), logits, true)
    assert found.values["average_precision"] == 1.0
    assert found.notes == ("no row has the label l1: average_precision leaves it out",)
    broken = score(spec(2), [[np.nan, 0.0], [0.0, 0.0]], true)
    assert set(broken.values.values()) == {0.0}
