"""Tasks from a user's files: formats, columns, labels, the split, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.task_data import load_task

from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.errors import DataError, UsageError

TWO = "text,label\ngood,yes\nbad,no\n"


def csv_task(folder: Path, text: str, **kwargs: Any) -> TextData:
    file = folder / "data.csv"
    file.write_bytes(text.encode())
    return load_task("csv", path=file, **kwargs)


def folder_task(folder: Path, train: str, validation: str, **kwargs: Any) -> TextData:
    (folder / "train.csv").write_text(train)
    (folder / "validation.csv").write_text(validation)
    return load_task("csv", path=folder, **kwargs)


# --- formats


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows = {
        "text": ['said "no", twice', "NA", "line\nbreak\u2028here"],
        "text_pair": ["None", "null", "é"],
        "label": [2, 10, 2],
    }
    data = Dataset.from_dict(rows)
    for split in ("train", "dev"):
        file = tmp_path / f"{split}.{suffix}"
        if suffix == "parquet":
            data.to_parquet(file)
        elif suffix == "jsonl":
            data.to_json(file)
        elif suffix == "json":
            file.write_text(json.dumps([dict(row) for row in data], indent=1))
        else:
            data.to_csv(file, index=False, sep="\t" if suffix == "tsv" else ",")
    task = load_task("csv", path=tmp_path)
    assert task.train[:] == {**rows, "label": [0, 1, 0]}
    assert task.spec.label_names == ("2", "10") and task.spec.text_columns == ("text", "text_pair")
    assert len(task.notes) == 1 and "second text" in task.notes[0]
    assert task.validation["validation"][:] == task.train[:]


def test_tsv_with_bare_quotes_keeps_them(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_text('text\tlabel\n"Shut up\t0\nhe said "hi"\t1\n"whole"\t1\nx"\t0\n')
    task = load_task("csv", path=file, validation_fraction=0.25)
    texts = [*task.train["text"], *task.validation["validation"]["text"]]
    assert sorted(texts) == ['"Shut up', '"whole"', 'he said "hi"', 'x"']


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    task = csv_task(tmp_path, "\ufefftext,label\r\ngood,yes\r\nbad,no\r\n")
    assert sorted([*task.train["text"], *task.validation["validation"]["text"]]) == ["bad", "good"]


def test_the_format_of_the_task_is_preferred_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TWO)
    (tmp_path / "train.jsonl").write_text('{"text": "j", "label": 0}\n{"text": "k", "label": 1}\n')
    task = load_task("json", path=tmp_path)
    assert {*task.train["text"], *task.validation["validation"]["text"]} == {"j", "k"}


def test_no_cache_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    folder_task(tmp_path, TWO, TWO)
    assert not cache.exists() and not list(work.iterdir())


# --- columns


def test_column_names_can_be_set(tmp_path: Path) -> None:
    text = "q,text_pair,a,y\nq1,ignored?,a1,no\nq2,x,a2,yes\n"
    task = csv_task(tmp_path, text, columns={"text": "q", "text_pair": "a", "label": "y"})
    assert task.spec.text_columns == ("q", "a") and task.spec.label_column == "y"
    assert set(task.train["text_pair"]) | set(task.validation["validation"]["text_pair"]) == {
        "a1",
        "a2",
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "lable"}, "did you mean label"),
        ({"text": "sentence"}, "no column 'sentence' for the text"),
        ({"text_pair": "other"}, "choose one of: text, label"),
    ],
)
def test_a_missing_column_lists_the_columns_of_the_file(
    tmp_path: Path, columns: dict[str, str | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        csv_task(tmp_path, TWO, columns=columns)
    assert "task.columns" in str(caught.value)


@pytest.mark.parametrize(("mark", "written"), [(",", "','"), (";", "';'"), ("\t", "'tab'")])
def test_a_file_with_another_separator_names_the_setting(
    tmp_path: Path, mark: str, written: str
) -> None:
    with pytest.raises(UsageError, match="no column 'text'") as caught:
        csv_task(tmp_path, TWO.replace(",", mark), separator="|")
    assert f"set task.separator to {written}" in str(caught.value.fix)


def test_column_missing_in_validation_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'label'.*validation\.csv"):
        folder_task(tmp_path, TWO, "text,lab\ngood,yes\n")


# --- labels (more of them in test_labels.py)


def test_unseen_label_gives_value_and_first_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'maybe'.*row 2") as caught:
        folder_task(tmp_path, TWO, "text,label\nx,yes\ny,maybe\nz,never\n")
    assert "validation.csv:3" in str(caught.value) and "no, yes" in str(caught.value)


def test_unseen_label_names_the_evaluation_set(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TWO + "fine,yes\nawful,no\n")
    (tmp_path / "other.csv").write_text("text,label\nx,maybe\n")
    with pytest.raises(DataError, match="'maybe' occurs in ood but not in training"):
        load_task(
            "csv", path=tmp_path / "train.csv", evaluation={"ood": str(tmp_path / "other.csv")}
        )


def test_a_word_among_numbers_is_an_unseen_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="occurs in validation but not in training"):
        folder_task(tmp_path, "text,label\na,0\nb,1\n", TWO)


def test_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every training label is 'yes'"):
        csv_task(tmp_path, "text,label\na,yes\nb,yes\n")


# --- damaged and empty


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("text,label\n", "holds no rows"),
        ("text,label\ngood,yes\n,no\n", r"column 'text' is empty\n.*data\.csv:3"),
        ("text,label\ngood,yes\nbad,\n", r"label.*is empty\n.*data\.csv:3"),
        ("text,label\ngood,yes\nbad\n", r"1 column, expected 2\n.*data\.csv:3"),
        ('text,label\n"a\nb",yes\nbad,no,x\n', r"3 columns, expected 2\n.*data\.csv:4"),
        ('text,label\n"open,yes\nbad,no\n', r"not CSV.*\n.*data\.csv:2"),
        (
            "text,label,text\na,1,b\nc,2,d\n",
            r"named 'text', got two\n.*data\.csv:1",
        ),
        ("text,label\ngood,0.5\n", "one row cannot be split"),
        (
            "text,label\n,no\na,yes\n ,no\n",
            r"'text' is empty, as in 1 more row\n.*data\.csv:2\nfix: remove rows without a text",
        ),
    ],
)
def test_errors_in_csv_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv_task(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": ', r"not JSON.*\n.*data\.json:2"),
        ('[{"text": "a", "label": 1},\n 5]', r"expected an object.*int\n.*row 2"),
        ('[{"text": "a",\n "label": }]', r"not JSON.*\n.*data\.json:2"),
        ('{"text": null, "label": 1}\n{"text": "b", "label": 0}', r"is empty\n.*data\.json:1"),
        ('{"text": "a", "label": 1}\n{"text": "b"}', r"label.*empty\n.*data\.json:2"),
        ('{"text": "a", "label": NaN}', "label.*is nan"),
        ('{"text": 3, "label": 1}\n{"text": "b", "label": 0}', "holds an integer, expected text"),
        ('{"text": "a", "label": [1]}', "is a list: expected a word or a number"),
    ],
)
def test_errors_in_json_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_task("json", path=file)


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a path"):
        load_task("csv")
    with pytest.raises(DataError, match="no such file"):
        load_task("csv", path=tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"no training file.*\n.*\n.*train\.csv, train\.tsv"):
        load_task("csv", path=tmp_path)


def test_the_task_decides_the_format_of_an_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TWO)
    assert load_task("csv", path=tmp_path / "data.txt").spec.label_names == ("no", "yes")


# --- splitting


def test_the_random_split_is_reproducible_and_noted(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(40))
    first = csv_task(tmp_path, text, validation_fraction=0.25)
    again = csv_task(tmp_path, text, validation_fraction=0.25)
    train, held = first.train["text"], first.validation["validation"]["text"]
    assert len(train) == 30 and len(held) == 10 and not set(train) & set(held)
    assert list(train) == sorted(train, key=lambda t: int(t[1:])), "file order is kept"
    assert first.data_hash == again.data_hash
    assert "10 of 40 rows" in first.notes[0] and "seed 0" in first.notes[0]


def test_the_hash_differs_between_pairs_and_joined_texts(tmp_path: Path) -> None:
    one = folder_task(
        tmp_path, "text,text_pair,label\nab,c,0\nx,y,1\n", "text,text_pair,label\na,b,0\n"
    )
    two = folder_task(
        tmp_path, "text,text_pair,label\na,bc,0\nx,y,1\n", "text,text_pair,label\na,b,0\n"
    )
    assert one.data_hash != two.data_hash


def test_the_builtin_task_has_both_labels_and_takes_no_path() -> None:
    one = load_task("builtin:acceptability", train_limit=50, eval_limit=20)
    assert len(one.train) == 50 and len(one.validation["validation"]) == 20
    assert set(one.train["label"]) == {0, 1} and one.spec.metric == "matthews_correlation"
    with pytest.raises(UsageError, match="takes no path"):
        load_task("builtin:acceptability", path=".")


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    text = "id,text,Text_Pair,label\n1,good,x,yes\n2,bad,y,no\n"
    assert "columns that are not used: id, Text_Pair" in csv_task(tmp_path, text).notes
    both = "text,text_pair,label\ngood,x,yes\nbad,y,no\n"
    # Validation has a second text, and training has none.
    assert "columns that are not used: text_pair" in folder_task(tmp_path, TWO, both).notes
    named = csv_task(tmp_path, both, columns={"text_pair": "text_pair"})
    assert not any("text_pair" in note for note in named.notes)
    assert any("column text_pair is the second" in note for note in csv_task(tmp_path, both).notes)


@pytest.mark.parametrize("columns", [{"text": "label"}, {"text_pair": "text"}])
def test_one_column_for_two_roles_is_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Expected a column for each of text and"):
        csv_task(tmp_path, TWO, columns=columns)


def test_a_repeated_json_key_is_refused_if_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    good = '{"text": "a", "x": 1, "x": 2, "label": 0}\n{"text": "b", "label": 1}\n'
    file.write_text(good)
    assert len(load_task("json", path=file).train) == 1
    file.write_text(good + '{"text": "c", "label": 0, "l\\u0061bel": 1}\n')
    with pytest.raises(DataError, match=r"named 'label', got two\nwhere: .*d\.jsonl:3"):
        load_task("json", path=file)


def test_an_object_with_two_lists_of_rows_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    file = tmp_path / "d.json"
    file.write_text(json.dumps({"data": rows, "authors": [{"name": "c"}]}))
    assert len(load_task("json", path=file).train) == 1
    file.write_text(json.dumps({"data": rows, "validation": rows}))
    with pytest.raises(DataError, match="Expected one list of rows in the object, got data, vali"):
        load_task("json", path=file)


@pytest.mark.parametrize("text", ['[{"text": "a", "label": 1}]', '\n{"text": "a"}\n{"text": "b"}'])
def test_json_in_a_csv_file_is_refused_as_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="Expected comma-separated values, got JSON"):
        csv_task(tmp_path, text)


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_repeated_header_is_refused(tmp_path: Path, mark: str) -> None:
    with pytest.raises(DataError, match=r"header is repeated here.*\nwhere: .*data\.csv:4"):
        csv_task(tmp_path, (TWO + TWO).replace(",", mark))
