"""Classes or scores, the names of classes, and labels that are refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.task_data import load_task

from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.errors import DataError, UsageError

CLASSES: Any = "classification"
SCORES: Any = "regression"


def write(file: Path, labels: Sequence[Any], names: Sequence[str] | None = None) -> None:
    """A file with one row a label, in the format of its suffix; ``names`` make a ClassLabel."""
    texts = [f"text {row}" for row in range(len(labels))]
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    elif file.suffix == ".jsonl":
        rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        table = pa.table({"text": texts, "label": list(labels)})
        if names is not None:
            feature = {"names": list(names), "_type": "ClassLabel"}
            info = {"info": {"features": {"label": feature}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, file)


def load(
    folder: Path,
    train: Sequence[Any],
    validation: Sequence[Any] | None = None,
    *,
    suffix: str = ".csv",
    **settings: Any,
) -> TextData:
    write(folder / f"train{suffix}", train)
    write(folder / f"validation{suffix}", train if validation is None else validation)
    return load_task("csv", path=folder, **settings)


# --- the name of a class


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),  # plain integers sort as numbers
        (["01", "1", "02"], ("01", "02", "1")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "2", "3+"], ("1", "2", "3+")),
        (["0", "-0"], ("-0", "0")),
        (["9007199254740993", "9007199254740992"], ("9007199254740992", "9007199254740993")),
        (["1" * 40, "1" * 39 + "2"], ("1" * 40, "1" * 39 + "2")),
        (["nan", "inf"], ("inf", "nan")),
        (["no", "NA", "yes"], ("NA", "no", "yes")),
        (["true", "True"], ("True", "true")),
        (["1", "\u0661", "\uff11"], ("1", "\u0661", "\uff11")),  # digits of other scripts
        (["1_000", "1000"], ("1000", "1_000")),
    ],
)
def test_a_class_is_the_text_of_its_label(
    tmp_path: Path, labels: list[str], names: tuple[str, ...]
) -> None:
    task = load(tmp_path, labels * 3)
    assert task.spec.label_names == names and not task.spec.regression
    assert [names[label] for label in task.train["label"]] == labels * 3
    assert task.spec.metric == "accuracy"
    assert all("differ only in case" in note for note in task.notes)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ("false", "true")),
        ([9007199254740993, 9007199254740992], ("9007199254740992", "9007199254740993")),
        ([2, "ten", 10], ("10", "2", "ten")),
    ],
)
def test_json_values_have_a_text(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    task = load(tmp_path, labels * 3, suffix=".jsonl")
    assert task.spec.label_names == names and task.notes == ()


def test_json_numbers_keep_the_text_of_the_file(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        rows = "\n".join(f'{{"text": "t", "label": {n}}}' for n in ("1.1", "1.10", "1e0", "-0"))
        (tmp_path / f"{split}.jsonl").write_text(rows)
    task = load_task("json", path=tmp_path, type=CLASSES)
    assert task.spec.label_names == ("-0", "1.1", "1.10", "1e0")
    with pytest.raises(UsageError, match=r"'1\.1' .*train\.jsonl:1.*'1\.10' .*train\.jsonl:2"):
        load_task("json", path=tmp_path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ("false", "true")),
        ([1.0, 0.1, 1e16], ("0.1", "1.0", "1e+16")),
        ([Decimal("1.10"), Decimal("2.00")], ("1.10", "2.00")),
        ([Decimal("90071992547409.93"), Decimal("90071992547409.92")],) * 2,
        ([2**63 - 1, 2**63 - 2], (str(2**63 - 2), str(2**63 - 1))),
    ],
)
def test_parquet_values_have_a_text(
    tmp_path: Path, labels: list[Any], names: Sequence[Any]
) -> None:
    task = load(tmp_path, labels * 3, suffix=".parquet", type=CLASSES)
    assert task.spec.label_names == tuple(sorted(map(str, names), key=names_order(names)))


def names_order(names: Sequence[Any]) -> Any:
    return int if all(str(name).isdigit() for name in names) else None


def test_spaces_around_labels_are_left_out_and_counted(tmp_path: Path) -> None:
    task = load(tmp_path, [" yes", "no", "yes", "no "] * 3, ["yes", "no"])
    assert task.spec.label_names == ("no", "yes")
    assert task.notes == ("spaces around 6 labels are left out",)


def test_text_and_number_of_one_spelling_are_one_class_with_a_note(tmp_path: Path) -> None:
    task = load(tmp_path, [1, "1", 0] * 2, suffix=".jsonl")
    assert task.spec.label_names == ("0", "1")
    assert len(task.notes) == 1 and "in others (1)" in task.notes[0]


def test_class_names_of_parquet_metadata_are_kept_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [1, 0] * 4, ["spam", "ham"])
    write(tmp_path / "validation.parquet", [0, 1], ["spam", "ham"])
    task = load_task("parquet", path=tmp_path)
    assert task.spec.label_names == ("spam", "ham")
    assert list(task.train["label"])[:2] == [1, 0]
    write(tmp_path / "validation.parquet", [0, 1], ["ham", "spam"])
    with pytest.raises(DataError, match=r"one list of different .*spam, ham in") as error:
        load_task("parquet", path=tmp_path)
    assert "validation.parquet" in str(error.value)
    write(tmp_path / "validation.parquet", [0, 2], ["spam", "ham"])
    with pytest.raises(DataError, match=r"is 2, and the file names the classes 0 to 1\n.*row 2"):
        load_task("parquet", path=tmp_path)


def test_class_names_are_read_from_files_that_datasets_wrote(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    rows = {"text": ["a", "b"] * 5, "label": [0, 1] * 5}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    task = load_task("parquet", path=tmp_path / "data.parquet")
    assert task.spec.label_names == ("ham", "spam")


def test_a_declared_class_without_rows_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1], ["a", "b", "c"])
    write(tmp_path / "validation.parquet", [0, 1], ["a", "b", "c"])
    task = load_task("parquet", path=tmp_path)
    assert task.spec.label_names == ("a", "b", "c")
    assert task.notes == ("no training row has the class c (validation rows: 0)",)


def test_glue_reads_class_ids_by_their_names(tmp_path: Path) -> None:
    """A copy of RTE that numbers the classes in the other order gives the same labels."""
    names = ["not_entailment", "entailment"]
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    task = load_task("glue/rte", path=tmp_path)
    assert task.spec.label_names == ("entailment", "not_entailment")
    assert list(task.train["label"]) == [1, 0]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_integer_that_is_one_class_by_name_and_another_by_id_is_refused(
    tmp_path: Path, suffix: str
) -> None:
    write(tmp_path / "train.parquet", [0, 1, 2] * 3, names=["2", "1", "0"])
    write(tmp_path / f"validation{suffix}", [1, 0, 1])
    with pytest.raises(DataError, match="may be class '0', or the id of class '2'") as error:
        load_task("parquet", path=tmp_path)
    assert error.value.where and error.value.where.startswith(f"{tmp_path}/validation{suffix}")
    write(tmp_path / "train.parquet", [0, 1, 2] * 3, names=["0", "1", "2"])
    task = load_task("parquet", path=tmp_path)
    assert list(task.validation["validation"]["label"]) == [1, 0, 1]


# --- one decision over all files


def test_a_fraction_in_either_file_makes_both_scores(tmp_path: Path) -> None:
    for train, validation in ((["1", "2.5"], ["3", "4"]), (["3", "4"], ["1", "2.5"])):
        task = load(tmp_path, train, validation)
        assert task.spec.regression and task.spec.label_names is None
        assert list(task.train["label"]) == [float(label) for label in train]
        assert task.train.features["label"].dtype == "float32"
        assert task.spec.metrics == ("pearson", "spearmanr")


def test_a_word_class_that_only_training_has(tmp_path: Path) -> None:
    task = load(tmp_path, ["1", "2", "3+"] * 4, ["1", "2", "1"])
    assert task.spec.label_names == ("1", "2", "3+")
    assert list(task.validation["validation"]["label"]) == [0, 1, 0]


def test_a_class_that_only_validation_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'1' occurs in validation but not in training.*row 2"):
        load(tmp_path, ["01", "02"], ["01", "1"])


@pytest.mark.parametrize(
    ("labels", "what", "line"),
    [
        (["1.1", "1.10", "2.3"], r"'1\.1' \(.*csv:2\) and '1\.10' \(.*csv:3\) are one number", 2),
        (["3", "3.0", "2.5"], r"'3' .* and '3\.0' .* are one number and two texts", 2),
        (["1.0", "2.0", "1.0"], r"every label .* whole number, and '1\.0' is written with a po", 2),
        (["1e5", "2", "3"], r"whole number, and '1e5' is written", 2),
        (["2.02", "NA", "1.6"], r"Expected a number .* 4 of 6 rows, got 'NA'", 3),
        (["2.02", "missing", "1.6"], "got 'missing'", 3),
        (["1,234.5", "2.5", "1.6"], "got '1,234.5'", 2),
        (["1", "2", "3", "n/a"], "Expected a number .* 6 of 8 rows, got 'n/a'", 5),
        (["3.11", "main", "dev"], r"Expected a word .* 4 of 6 rows, got '3\.11'", 2),
        (["1,5", "2,5", "3"], "got '1,5': it may be a number with a comma", 2),
        (["1,000", "999", "2"], "got '1,000': it may be a number with a comma", 2),
    ],
)
def test_ambiguous_labels_are_refused_with_the_setting(
    tmp_path: Path, labels: list[str], what: str, line: int
) -> None:
    with pytest.raises(UsageError, match=what) as error:
        load(tmp_path, labels)
    assert error.value.where == f"{tmp_path / 'train.csv'}:{line}"
    assert "task.type: classification" in (error.value.fix or "")
    task = load(tmp_path, labels, type=CLASSES)
    assert task.spec.label_names == tuple(sorted(set(labels)))
    assert load(tmp_path, labels, metric="accuracy").spec.label_names == task.spec.label_names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_whole_floats_are_classes_or_scores_by_the_setting_alone(
    tmp_path: Path, suffix: str
) -> None:
    labels = [1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match="every label in column 'label' is a whole number"):
        load(tmp_path, labels, suffix=suffix)
    task = load(tmp_path, labels, suffix=suffix, type=CLASSES)
    assert task.spec.label_names == ("1.0", "2.0", "3.0")
    assert load(tmp_path, labels, suffix=suffix, type=SCORES).spec.regression


@pytest.mark.parametrize("settings", [{"type": SCORES}, {"metric": "spearmanr"}])
def test_scores_by_a_setting(tmp_path: Path, settings: dict[str, Any]) -> None:
    task = load(tmp_path, ["1", "2", "1.10", "1.1", "-5e-1"], **settings)
    assert task.spec.regression
    assert list(task.train["label"]) == pytest.approx([1, 2, 1.1, 1.1, -0.5])


@pytest.mark.parametrize(
    "label", ["NA", "nan", "inf", "word", "1,000", "1_000", "true", "0x10", "\u0663"]
)
def test_scores_by_a_setting_must_be_numbers(tmp_path: Path, label: str) -> None:
    with pytest.raises(UsageError, match=r"task\.type regression needs numbers") as error:
        load(tmp_path, ["1", "2.5", label], type=SCORES)
    assert error.value.where == f"{tmp_path / 'train.csv'}:4" and repr(label) in str(error.value)
    with pytest.raises(UsageError, match=r"task\.metric pearson needs numbers"):
        load(tmp_path, ["1", "2.5", label], metric="pearson")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "is empty"),
        (" ", "is empty"),
        (float("nan"), "is nan"),
        (float("inf"), "is inf"),
        ([1], "is a list"),
        ("\ud800", "half of a character"),
    ],
)
@pytest.mark.parametrize("type", [None, CLASSES, SCORES])
def test_an_empty_label_is_refused_whatever_the_setting(
    tmp_path: Path, label: Any, message: str, type: Any
) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, [1, label, 2], suffix=".jsonl", type=type)
    assert error.value.where == f"{tmp_path / 'train.jsonl'}:2" and error.value.fix


@pytest.mark.parametrize("label", ["1e400", "-1" + "0" * 40])
def test_a_score_too_large_for_float32_is_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match="too large"):
        load(tmp_path, ["0.5", label])
    assert load(tmp_path, ["0.5", label], type=CLASSES).spec.label_names is not None


def test_scores_that_are_equal_in_float32_are_refused_or_noted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"every training label is 0\.5") as error:
        load(tmp_path, ["0.5", "0.50", "0.5"], type=SCORES)
    assert error.value.fix
    # Seconds since 1970: float32 tells apart every 128 of them.
    seconds = [str(1_700_000_000 + second) for second in range(20)]
    with pytest.raises(DataError, match=r"every training label is 1\.7e\+09"):
        load(tmp_path, seconds, type=SCORES)
    task = load(tmp_path, [*seconds, "1800000000"], type=SCORES)
    assert any("the 21 different scores are only 2 as float32" in note for note in task.notes)
    fine = [f"{number / 7:.17f}" for number in range(1, 20)]
    assert load(tmp_path, fine).notes == ()


# --- notes


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["Yes", "yes", "no"], "'Yes' and 'yes'"),
        (["no", "no\u200b", "yes"], r"'no' and 'no\u200b'"),
        (["b", "b\0", "c"], r"'b' and 'b\x00'"),
        (["very good", "very  good", "bad"], "'very  good' and 'very good'"),
        (["caf\u00e9", "cafe\u0301", "bar"], r"'cafe\u0301' and 'caf\xe9'"),
        (["01", "1", "+1"], "'+1' and '01' and '1'"),
        (["1", "\uff11", "x"], r"'1' and '\uff11'"),
    ],
)
def test_classes_that_look_alike_are_noted(tmp_path: Path, labels: list[str], shown: str) -> None:
    (note,) = load(tmp_path, labels * 3).notes
    assert note.endswith(f"written: {shown}")


def test_booleans_among_numbers_are_noted(tmp_path: Path) -> None:
    task = load(tmp_path, [True, 1] * 3, suffix=".jsonl")
    assert task.spec.label_names == ("1", "true")
    assert task.notes == (
        "labels are booleans in some rows and numbers in others: true and 1 are two classes",
    )


def test_few_rows_per_class_are_noted(tmp_path: Path) -> None:
    task = load(tmp_path, [str(number) for number in range(20)])
    assert len(task.spec.label_names or ()) == 20
    assert len(task.notes) == 1 and task.notes[0].startswith("20 classes in 20 training rows")
    assert "task.type: regression" in task.notes[0]
    scores = [f"{number}.5" for number in range(20)] + ["NA"]
    assert "task.type: regression" in load(tmp_path, scores, metric="accuracy").notes[0]
    words = load(tmp_path, [f"w{number}" for number in range(20)])
    assert "task.type" not in words.notes[0]
    assert load(tmp_path, [str(number % 4) for number in range(20)]).notes == ()


def test_a_class_without_a_training_row_is_noted(tmp_path: Path) -> None:
    labels = ["common", "other"] * 6
    for row in range(13):  # one of these rows is split off for validation
        write(tmp_path / "data.csv", [*labels[:row], "rare", *labels[row:]])
        task = load_task("csv", path=tmp_path / "data.csv")
        if 2 not in task.train["label"]:
            break
    assert task.spec.label_names == ("common", "other", "rare")
    assert task.notes[-1] == "no training row has the class rare (validation rows: 1)"
    (tmp_path / "data.csv").unlink()
    limited = load(tmp_path, [*labels, "rare"], train_limit=2)
    assert limited.notes[-1] == "no training row has the class rare (validation rows: 1)"


# --- the metric and its class


def test_the_positive_class_is_named_and_can_be_chosen(tmp_path: Path) -> None:
    labels = ["fraud", "ok", "ok", "ok"]
    task = load(tmp_path, labels, metric="f1")
    assert task.spec.positive_label == "ok" and task.majority["f1"] == pytest.approx(6 / 7)
    assert "f1 is that of class 'ok', the second of fraud, ok" in task.notes[-1]
    chosen = load(tmp_path, labels, metric="f1", positive_label="fraud")
    assert chosen.spec.positive_label == "fraud" and chosen.majority["f1"] == 0.0
    assert chosen.notes == ()
    assert load(tmp_path, labels).spec.positive_label is None
    absent = load(tmp_path, labels, ["ok", "ok"], metric="f1", positive_label="fraud")
    assert absent.notes[0].startswith("validation has no row of class 'fraud': f1,")


def test_f1_of_three_classes_is_recorded_as_f1_macro(tmp_path: Path) -> None:
    task = load(tmp_path, ["a", "b", "c"] * 3, metric="f1")
    assert task.spec.metric == "f1_macro" and task.spec.positive_label is None
    assert task.notes == ("f1 of 3 classes is their plain mean: f1_macro",)
    with pytest.raises(UsageError, match="is for two classes, and csv has 3"):
        load(tmp_path, ["a", "b", "c"] * 3, metric="f1", positive_label="a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive_label": "fruad", "metric": "f1"}, "did you mean fraud"),
        ({"positive_label": "fraud"}, "no effect on the default metric"),
        ({"positive_label": "fraud", "metric": "accuracy"}, "no effect on accuracy"),
        ({"positive_label": "fraud", "metric": "f1_macro"}, "no effect on f1_macro"),
        ({"type": SCORES, "metric": "f1"}, "f1 is a metric of classification"),
        ({"type": CLASSES, "metric": "pearson"}, "pearson is a metric of regression"),
        ({"metric": "f1_makro"}, "did you mean f1_macro"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path, ["fraud", "ok"], **settings)
