"""GLUE tasks: the real files, every quirk of the original layout, other formats, bad input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import paths
from support.task_data import load_task

from sparsegrad_cli.data.examples import TextData
from sparsegrad_cli.errors import DataError, DownloadError, UsageError
from sparsegrad_cli.recipe.tasks import GLUE_TASKS, known_task_names


def write(path: Path, text: str, bom: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


def tsv(path: Path, *rows: str, bom: bool = False) -> Path:
    """Rows written with | where the file has a tab."""
    return write(path, "".join(row.replace("|", "\t") + "\n" for row in rows), bom=bom)


def dicts(data: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in data]


@pytest.fixture(scope="module")
def real() -> dict[str, TextData]:
    folder = paths.shared_data() / "glue"
    return {n: load_task(f"glue/{n}", path=folder) for n in ("cola", "sst2", "rte", "wnli")}


# --- the real files

# rows and label counts of the published splits, counted with awk over the files
REAL = {
    "cola": ({0: 2528, 1: 6023}, {0: 322, 1: 721}),
    "sst2": ({0: 29780, 1: 37569}, {0: 428, 1: 444}),
    "rte": ({0: 1249, 1: 1241}, {0: 146, 1: 131}),
    "wnli": ({0: 323, 1: 312}, {0: 40, 1: 31}),
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_counts(real: dict[str, TextData], name: str) -> None:
    task = real[name]
    assert Counter(task.train["label"]) == REAL[name][0]
    assert Counter(task.validation["validation"]["label"]) == REAL[name][1]
    assert task.notes == ()
    assert task.train.column_names == (
        ["text", "text_pair", "label"] if name in ("rte", "wnli") else ["text", "label"]
    )
    assert str(task.train.features["label"].dtype) == "int64"


def test_real_majority_is_that_of_the_published_splits(real: dict[str, TextData]) -> None:
    assert real["cola"].majority == {
        "matthews_correlation": 0.0,
        "accuracy": pytest.approx(721 / 1043),
    }
    assert real["rte"].majority == {"accuracy": pytest.approx(146 / 277)}
    assert real["wnli"].majority == {"accuracy": pytest.approx(40 / 71)}


def test_rows_with_bare_quotes_are_read_whole(real: dict[str, TextData]) -> None:
    cola = set(real["cola"].train["text"])
    assert 'Susan whispered "Shut up".' in cola
    raw = (paths.shared_data() / "glue" / "RTE" / "train.tsv").read_text(encoding="utf-8")
    quoted = [line.split("\t") for line in raw.split("\n")[1:] if line.count('"') % 2]
    assert quoted, "the real file holds rows with an odd number of quotes"
    pairs = set(zip(real["rte"].train["text"], real["rte"].train["text_pair"], strict=True))
    assert all((row[1], row[2]) in pairs for row in quoted)


def test_every_real_row_is_the_line_of_the_file(real: dict[str, TextData]) -> None:
    raw = (paths.shared_data() / "glue" / "SST-2" / "train.tsv").read_bytes().decode()
    lines = [line.split("\t") for line in raw.split("\n")[1:] if line]
    got = zip(real["sst2"].train["text"], real["sst2"].train["label"], strict=True)
    assert [[text, str(label)] for text, label in got] == lines


def test_task_folder_or_its_parent(real: dict[str, TextData]) -> None:
    folder = paths.shared_data() / "glue"
    assert load_task("glue/rte", path=folder / "RTE").data_hash == real["rte"].data_hash


def test_a_missing_training_file_names_the_tried_files() -> None:
    with pytest.raises(DataError) as caught:
        load_task("glue/qnli", path=paths.shared_data() / "glue")
    assert "training" in str(caught.value) and "train.tsv" in str(caught.value)


# --- the other layouts, in files of the published form

MRPC = "Quality|#1 ID|#2 ID|#1 String|#2 String"


def test_mrpc_with_byte_order_mark(tmp_path: Path) -> None:
    rows = ['1|7|8|He said "no.|He said no.', "0|9|10|A.|B."]
    tsv(tmp_path / "MRPC" / "train.tsv", MRPC, *rows, bom=True)
    tsv(tmp_path / "MRPC" / "dev.tsv", MRPC, rows[1], bom=True)
    task = load_task("glue/mrpc", path=tmp_path)
    assert dicts(task.train)[0] == {
        "text": 'He said "no.',
        "text_pair": "He said no.",
        "label": 1,
    }
    assert task.spec.metrics == ("accuracy", "f1") and len(task.validation["validation"]) == 1


CORPUS = ["1|1|2|a|b", "0|3|4|c|d", "1|5|6|e|f"]


@pytest.mark.parametrize(
    ("extra", "train", "validation"),
    [
        ({"dev.tsv": [MRPC, CORPUS[1]]}, ["a", "e"], ["c"]),
        ({"mrpc_dev_ids.tsv": ["1|2"]}, ["c", "e"], ["a"]),
        ({"msr_paraphrase_test.txt": [MRPC, "1|8|9|t|u"]}, ["a", "c", "e"], ["t"]),
    ],
)
def test_mrpc_as_microsoft_published_it(
    tmp_path: Path, extra: dict[str, list[str]], train: list[str], validation: list[str]
) -> None:
    tsv(tmp_path / "msr_paraphrase_train.txt", MRPC, *CORPUS, bom=True)
    for name, rows in extra.items():
        tsv(tmp_path / name, *rows, bom=name != "mrpc_dev_ids.tsv")
    task = load_task("glue/mrpc", path=tmp_path)
    assert list(task.train["text"]) == train
    assert list(task.validation["validation"]["text"]) == validation
    assert any(next(iter(extra)) in note for note in task.notes)


def test_mrpc_without_validation_data_is_refused(tmp_path: Path) -> None:
    tsv(tmp_path / "msr_paraphrase_train.txt", MRPC, *CORPUS)
    with pytest.raises(DataError, match=r"tried: dev\.tsv"):
        load_task("glue/mrpc", path=tmp_path)


def test_qqp_leaves_out_the_torn_rows(tmp_path: Path) -> None:
    head = "id|qid1|qid2|question1|question2|is_duplicate"
    rows = [
        "1|2|3|Is it?|Is it so?|1",
        "4|5|6|Was he",
        '" |a real figure?|0',
        '7|8|9|""Why?|How?|0',
    ]
    tsv(tmp_path / "qqp" / "train.tsv", head, *rows)
    tsv(tmp_path / "qqp" / "dev.tsv", head, rows[0])
    task = load_task("glue/qqp", path=tmp_path)
    assert list(task.train["text"]) == ["Is it?", '""Why?']
    assert list(task.train["label"]) == [1, 0]
    assert task.notes == ("train: 2 torn lines of train.tsv left out, as in nyu-mll/glue",)


def test_stsb_is_regression_with_extra_columns(tmp_path: Path) -> None:
    head = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
    tsv(
        tmp_path / "STS-B" / "train.tsv",
        head,
        "0|g|f|2012|1|n|n|A plane.|An air plane.|5.000",
        "1|g|f|2012|4|n|n|A man.|A woman.|0.750|licence|more",
    )
    tsv(tmp_path / "STS-B" / "dev.tsv", head, "0|g|f|2012|1|n|n|x|y|2.5", "1|g|f|2|1|n|n|x|z|1.5")
    task = load_task("glue/stsb", path=tmp_path)
    assert task.spec.regression and task.spec.metric == "pearson"
    assert list(task.train["label"]) == [5.0, 0.75]
    assert task.train.features["label"].dtype == "float32"
    assert task.majority == {"pearson": 0.0, "spearmanr": 0.0}


MNLI = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|"
    "sentence2_parse|sentence1|sentence2|label1"
)


def mnli_row(premise: str, gold: str, extra: str = "") -> str:
    return f"0|1|1a|g|( p )|( h )|(R p)|(R h)|{premise}|so|neutral{extra}|{gold}"


def test_mnli_has_two_validation_sets_and_drops_rows_without_gold(tmp_path: Path) -> None:
    dev = f"{MNLI}|label2|label3|label4|label5|gold_label"
    four = "|neutral" * 4
    tsv(
        tmp_path / "MNLI" / "train.tsv",
        f"{MNLI}|gold_label",
        *(mnli_row(*row) for row in [("a", "entailment"), ("b", "contradiction"), ("c", "-")]),
    )
    for kind, gold in (("matched", "neutral"), ("mismatched", "contradiction")):
        tsv(
            tmp_path / "MNLI" / f"dev_{kind}.tsv",
            dev,
            mnli_row(kind, gold, four),
            mnli_row("x", "-", four),
        )
    task = load_task("glue/mnli", path=tmp_path)
    assert list(task.train["label"]) == [0, 2]
    assert list(task.validation) == ["validation_matched", "validation_mismatched"]
    assert dicts(task.validation["validation_matched"]) == [
        {"text": "matched", "text_pair": "so", "label": 1}
    ]
    assert dicts(task.validation["validation_mismatched"])[0]["label"] == 2
    assert len(task.notes) == 4 and "1 rows without a gold label" in task.notes[0]
    assert task.notes[3] == "no training row has the class neutral (validation rows: 1)"


def test_qnli_word_labels(tmp_path: Path) -> None:
    head = "index|question|sentence|label"
    tsv(tmp_path / "QNLI" / "train.tsv", head, "0|Q?|S.|entailment", '1|"Q2?|S2.|not_entailment')
    tsv(tmp_path / "QNLI" / "dev.tsv", head, "0|Q?|S.|not_entailment")
    task = load_task("glue/qnli", path=tmp_path / "QNLI")
    assert list(task.train["label"]) == [0, 1]
    assert task.train["text"][1] == '"Q2?'
    assert list(task.validation["validation"]["label"]) == [1]


def test_wnli_ids_are_reversed(tmp_path: Path) -> None:
    head = "index|sentence1|sentence2|label"
    tsv(tmp_path / "train.tsv", head, "0|a|b|entailment", "1|a|b|0")
    tsv(tmp_path / "dev.tsv", head, "0|a|b|1")
    assert list(load_task("glue/wnli", path=tmp_path).train["label"]) == [1, 0]


# --- the same as Parquet, CSV, JSON lines


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "shards"])
def test_hub_columns_in_other_formats(tmp_path: Path, suffix: str) -> None:
    from datasets import Dataset

    rows: dict[str, list[Any]] = {
        "sentence1": ['He said, "no"', "None", "c"],
        "sentence2": ["x\ny", "NA", "z"],
        "label": [0, 1, -1],
        "idx": [0, 1, 2],
    }
    data = Dataset.from_dict(rows)
    for split in ("train", "validation"):
        if suffix == "shards":
            data.select([0, 1]).to_parquet(tmp_path / f"{split}-00000-of-00002.parquet")
            data.select([2]).to_parquet(tmp_path / f"{split}-00001-of-00002.parquet")
        elif suffix == "parquet":
            data.to_parquet(tmp_path / f"{split}.parquet")
        elif suffix == "csv":
            data.to_csv(tmp_path / f"{split}.csv", index=False)
        else:
            data.to_json(tmp_path / f"{split}.jsonl")
    task = load_task("glue/rte", path=tmp_path)
    assert dicts(task.train) == [
        {"text": 'He said, "no"', "text_pair": "x\ny", "label": 0},
        {"text": "None", "text_pair": "NA", "label": 1},
    ]
    assert task.notes[0] == "train: 1 rows with the hidden label -1 left out"


# --- bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["x|1||good", "x|1|good"], r"3 columns, expected 4.*\n.*train\.tsv:2"),
        (["x|1||good", "x|7||bad"], r"'7' is not a label of glue/cola.*\n.*train\.tsv:2"),
        (["x|1||good", "x|||bad"], r"'' is not a label"),
        (["x|-1||good"], "no row of the train split has a label"),
        ([], "holds no rows"),
    ],
)
def test_errors_in_cola_rows_name_file_and_line(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    tsv(tmp_path / "train.tsv", *rows)
    tsv(tmp_path / "dev.tsv", "x|1||good")
    with pytest.raises(DataError, match=message):
        load_task("glue/cola", path=tmp_path)


def test_a_file_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"x\t1\t\tcaf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8: byte 0xe9 at offset 8"):
        load_task("glue/cola", path=tmp_path)


def test_the_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    tsv(tmp_path / "CoLA" / "train.tsv", "x|1||good")
    with pytest.raises(UsageError, match="is that of CoLA, not of RTE"):
        load_task("glue/rte", path=tmp_path / "CoLA")


def test_the_columns_of_another_task_are_refused(tmp_path: Path) -> None:
    tsv(tmp_path / "train.tsv", "sentence|label", "good|1")
    tsv(tmp_path / "dev.tsv", "sentence|label", "good|1")
    with pytest.raises(DataError, match="no column 'sentence1'"):
        load_task("glue/rte", path=tmp_path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="Parquet"):
        load_task("glue/rte", path=tmp_path)


@pytest.mark.parametrize("path", ["gone", "file"])
def test_a_glue_path_must_be_a_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"task\.path"):
        load_task("glue/rte", path=tmp_path / path)


@pytest.mark.parametrize("name", ["glue/ret", "rte", "glue/", "builtin:acceptabilty"])
def test_an_unknown_task_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="glue/rte") as caught:
        load_task(name)
    assert caught.value.exit_code == 2


def test_metric_and_column_choices_for_glue(tmp_path: Path) -> None:
    tsv(tmp_path / "train.tsv", "x|1||good", "x|0|*|bad")
    tsv(tmp_path / "dev.tsv", "x|1||good", "x|0|*|bad")
    task = load_task("glue/cola", path=tmp_path, metric="f1")
    assert task.spec.metric == "f1" and "f1" in task.majority
    assert GLUE_TASKS["cola"].metric == "matthews_correlation"
    with pytest.raises(UsageError, match="did you mean accuracy"):
        load_task("glue/cola", path=tmp_path, metric="acuracy")
    with pytest.raises(UsageError, match="columns has no effect"):
        load_task("glue/cola", path=tmp_path, columns={"text": "x"})


# --- limits and hash


def test_limits_take_the_first_rows_and_change_the_hash(tmp_path: Path) -> None:
    tsv(tmp_path / "train.tsv", "x|1||a", "x|1||b", "x|0||c")
    tsv(tmp_path / "dev.tsv", "x|1||d", "x|0||e")
    whole = load_task("glue/cola", path=tmp_path)
    part = load_task("glue/cola", path=tmp_path, train_limit=2, eval_limit=1)
    assert list(part.train["text"]) == ["a", "b"]
    assert list(part.validation["validation"]["text"]) == ["d"]
    assert any("first 2 of 3 rows" in note for note in part.notes)
    assert any("sorted by label" in note for note in part.notes)
    assert load_task("glue/cola", path=tmp_path).data_hash == whole.data_hash != part.data_hash
    tsv(tmp_path / "train.tsv", "x|1||b", "x|1||a", "x|0||c")
    assert load_task("glue/cola", path=tmp_path).data_hash != whole.data_hash


# --- the hub


def test_an_unreachable_hub_is_reported_with_the_local_alternative(empty_hub_cache: Path) -> None:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DownloadError) as caught:
        load_task("glue/rte")
    text = str(caught.value)
    assert "glue/rte" in text and "HF_HUB_OFFLINE is set" in text and "task.path" in text
    assert before == datasets.config.HF_HUB_OFFLINE


def test_hub_cache_is_used_offline(
    empty_hub_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from datasets import ClassLabel, DatasetInfo, Features, SplitDict, SplitInfo, Value
    from datasets.arrow_writer import ArrowWriter

    folder = empty_hub_cache / "nyu-mll___glue" / "rte" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    names = ["entailment", "not_entailment"]
    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=names),
            "idx": Value("int32"),
        }
    )
    splits = SplitDict()
    rows = {"sentence1": ["a", "b"], "sentence2": ["x", "y"], "label": [1, -1], "idx": [0, 1]}
    for split in ("train", "validation"):
        writer = ArrowWriter(path=str(folder / f"glue-{split}.arrow"), features=features)
        writer.write_batch(rows)
        count, size = writer.finalize()
        splits.add(SplitInfo(split, num_examples=count, num_bytes=size))
    info = DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name="glue",
        config_name="rte",
        version="0.0.0",
        splits=splits,
    )
    info.write_to_directory(str(folder))
    capfd.readouterr()
    task = load_task("glue/rte")
    assert dicts(task.train) == [{"text": "a", "text_pair": "x", "label": 1}]
    assert "cached copy" in task.notes[0] and "hidden label" in task.notes[1]
    assert "Using the latest cached" not in capfd.readouterr().err


def test_known_names_cover_all_nine_tasks() -> None:
    names = known_task_names()
    assert len([name for name in names if name.startswith("glue/")]) == 9
    assert {"builtin:acceptability", "csv", "json", "parquet"} <= set(names)


def test_files_of_glue_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv", "test.csv", "validation.jsonl", "more.csv"):
        (tmp_path / name).write_text("sentence,label\na,0\nb,1\n")
    (note,) = load_task("glue/sst2", path=tmp_path).notes
    assert note == (f"not read in {tmp_path}: more.csv, validation.jsonl; read: train.csv, dev.csv")
