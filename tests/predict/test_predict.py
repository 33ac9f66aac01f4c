"""`sparsegrad predict`: every source and format, the same answers as transformers."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_runs import Cli
from support.small_runs import (
    ROWS,
    answers,
    base_folder,
    data_folder,
    end_texts,
    sentences,
    tokenizer_of,
    train,
)

from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.records.store import load_run, write
from sparsegrad_cli.records.study import CellEntry, StudyRecord
from sparsegrad_cli.restore.restore import load_trained
from sparsegrad_cli.restore.run_files import open_run

TEXTS = [text for text, _ in sentences(2, ROWS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    base, data = end_texts(base_folder(folder / "base")), data_folder(folder / "data")
    return train(folder / "run", base, data, "method.density=0.05", "method.rank=7")


@pytest.fixture(scope="module")
def expected(run: Path) -> torch.Tensor:
    """Return the probabilities (rows, 2) of the validation texts, by the restored model."""
    trained = load_trained(open_run(run), ROWS)
    logits, _ = answers(trained.setup.model, tokenizer_of(run))
    return logits.double().softmax(1)


def write_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    return path


def standard_input(text: str, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode(encoding)))


def check(rows: list[dict[str, Any]], expected: torch.Tensor) -> None:
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected.tolist(), strict=True):
        assert row["prediction"] == ("high", "low")[values[1] > values[0]]
        assert float(row["probability"]) == pytest.approx(max(values), abs=2e-5)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_keep_all_columns(
    suffix: str, run: Path, expected: torch.Tensor, cli: Cli, tmp_path: Path
) -> None:
    source, target = write_csv(tmp_path / "new.csv", TEXTS), tmp_path / f"out{suffix}"
    ended = cli("predict", str(run), str(source), "-o", str(target), "-p")
    assert ended.code == 0, ended.err
    assert f"{ROWS} rows labelled (" in ended.flat
    assert f"written to {target}" in ended.flat.replace(" ", "").replace("writtento", "written to ")
    rows: list[dict[str, Any]]
    if suffix == ".parquet":
        rows = pq.read_table(target).to_pylist()
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    else:
        with target.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    check(rows, expected)
    names = ["id", "text", "prediction", "probability", "probability_high", "probability_low"]
    assert [list(row) for row in rows] == [names] * ROWS
    assert [(row["id"], row["text"]) for row in rows] == [
        (str(number), text) for number, text in enumerate(TEXTS)
    ]
    # A file of every format can be labelled: the columns that it has now are refused by name.
    again = cli("predict", str(run), str(target))
    assert again.code == 2
    assert "already has a column 'prediction'" in again.flat


def test_batch_size_changes_nothing(run: Path, cli: Cli, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "new.csv", TEXTS)
    written = {
        size: cli("predict", str(run), str(source), "-q", "--batch-size", str(size)).out
        for size in (1, 7, 64)
    }
    assert written[1] == written[7] == written[64]
    assert len(list(csv.DictReader(io.StringIO(written[1])))) == ROWS


def test_texts_and_standard_input(
    run: Path, expected: torch.Tensor, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = cli("predict", str(run), *TEXTS[:3], "--json")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    check(rows, expected[:3])
    assert [row["text"] for row in rows] == TEXTS[:3]
    label, probability, text = cli("predict", str(run), TEXTS[0]).out.strip().split("\t")
    assert (label, text) == (rows[0]["prediction"], TEXTS[0])
    assert float(probability) == pytest.approx(rows[0]["probability"], abs=6e-4)
    monkeypatch.setattr("sys.stdin", standard_input("\n".join(TEXTS)))
    ended = cli("predict", str(run), "-", "--json")
    check([json.loads(line) for line in ended.out.splitlines()], expected)


@pytest.mark.parametrize("form", ["merged", "adapter", "lora"])
def test_exports_answer_like_the_run(
    form: str, run: Path, expected: torch.Tensor, cli: Cli, tmp_path: Path
) -> None:
    folder = tmp_path / form
    assert cli("export", str(run), "--to", form, "-o", str(folder), "-q").code == 0
    ended = cli("predict", str(folder), *TEXTS, "--json", "--max-length", "16")
    check([json.loads(line) for line in ended.out.splitlines()], expected)


def test_best_run_of_a_comparison(run: Path, cli: Cli, tmp_path: Path) -> None:
    """Scores are those of the record; the better run is the third one here."""
    cells = []
    for seed, (status, score) in enumerate([("done", 0.5), ("failed", 0.99), ("done", 0.75)]):
        found = load_run(run)
        assert found.metrics is not None and found.metrics.best is not None
        best = found.metrics.best.changed(score=score)
        kept = found.changed(metrics=found.metrics.changed(best=best))
        where = "../run" if seed == 2 else "nowhere"
        cell = {"task": "csv", "method": "core", "seed": seed, "run_dir": where, "status": status}
        cells.append(CellEntry.model_validate({**cell, "run": kept}))
    study = run.parent / "study"
    study.mkdir()
    write(StudyRecord(cells=cells), study / "compare.json")
    ended = cli("predict", str(study), *TEXTS[:4])
    assert "the best of 2 runs: core, seed 2 (accuracy 0.75)" in ended.flat
    assert ended.out == cli("predict", str(run), *TEXTS[:4]).out


def test_pairs_and_scores(run: Path, cli: Cli, tmp_path: Path) -> None:
    """A regressor of two texts gives numbers; its columns are those of the training file."""
    data = tmp_path / "pairs.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        rows = [(a, b, f"{n / 7:.2f}") for n, (a, b) in enumerate(pairwise(TEXTS))]
        csv.writer(file).writerows([("first", "second", "score"), *rows])
    task = (
        "task.columns={text: first, text_pair: second, label: score}",
        "task.type=regression",
        f"task.path={data}",
    )
    scored = train(tmp_path / "run", run.parent / "base", run.parent / "data", "method=lora", *task)
    ended = cli("predict", str(scored), str(data), "-o", str(tmp_path / "out.csv"))
    assert ended.code == 0, ended.err
    assert "scores from" in ended.flat
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    values = [float(row["prediction"]) for row in found]
    assert len(set(values)) > 1
    shown = cli("predict", str(scored), TEXTS[0], TEXTS[1], "--json").out
    assert json.loads(shown) == {
        "first": TEXTS[0],
        "second": TEXTS[1],
        "prediction": pytest.approx(values[0], rel=1e-4),
    }
    odd = cli("predict", str(scored), "one")
    assert odd.code == 2
    assert "give the texts two at a time" in odd.flat


def test_cut_rows_are_counted(run: Path, cli: Cli, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "long.csv", ["short", "x" * 40, "y" * 15, "z" * 17])
    ended = cli("predict", str(run), str(source), "-o", str(tmp_path / "out.csv"))
    assert "2 were longer than the model reads and were cut" in ended.flat
    one = cli("predict", str(run), "x" * 40)
    assert "1 was longer than the model reads and was cut" in one.flat


def test_an_empty_text_is_labelled_and_counted(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row keeps its place, from a file or a pipe; blank lines at the end are no texts."""
    one = write_csv(tmp_path / "one.csv", [TEXTS[0], "", TEXTS[1]])
    written = tmp_path / "out.jsonl"
    ended = cli("predict", str(run), str(one), "-o", str(written))
    assert ended.code == 0 and "1 of them has an empty text." in ended.flat
    labels = [json.loads(line)["prediction"] for line in written.read_text().splitlines()]
    monkeypatch.setattr("sys.stdin", standard_input(f"{TEXTS[0]}\n\n{TEXTS[1]}\n\n  \n"))
    piped = cli("predict", str(run), "-")
    assert [line.split("\t")[0] for line in piped.out.splitlines()] == labels
    assert "3 rows labelled" in piped.flat and "1 of them has an empty text." in piped.flat
    assert cli("predict", str(run), "").out == piped.out.splitlines()[1] + "\n"


def test_empty_texts_are_measured_and_counted(run: Path, cli: Cli, tmp_path: Path) -> None:
    rows = [*sentences(2, 8), ("", "low"), ("  ", "high")]
    source = tmp_path / "test.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    found = json.loads(cli("evaluate", str(run), str(source), "--json", "--resamples", "0").out)
    assert sum(map(sum, found["confusion"])) == found["rows"] == 10
    assert "10 rows are measured; 2 of them have an empty text" in found["notes"]


def test_a_model_without_special_tokens_cannot_read_an_empty_text(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's and LLaMA's tokenizers may give no token at all, of which there is no answer."""
    monkeypatch.setattr(Classifier, "reads_empty_texts", False)
    source, target = write_csv(tmp_path / "new.csv", [*TEXTS, " "]), tmp_path / "out.csv"
    target.write_text("as it was")
    ended = cli("predict", str(run), str(source), "-o", str(target))
    assert ended.code == 2 and "makes no token of an empty text" in ended.flat
    assert f"new.csv:{ROWS + 2}" in ended.flat.replace(" ", "")
    assert target.read_text() == "as it was"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_text_that_is_not_utf8_is_refused_with_its_line(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.csv").write_bytes("text,n\nfine,1\ncaf\xe9,2\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", standard_input("text\nfine\ncaf\xe9\n", "latin-1"))
    for source, place in ((str(tmp_path / "new.csv"), "new.csv:3"), ("-", "standard input:3")):
        ended = cli("predict", str(run), source)
        assert ended.code == 2 and place in ended.flat
        assert "not UTF-8: byte 0xe9 at offset 3" in ended.flat and "iconv -f" in ended.flat


def test_the_input_file_is_not_replaced(run: Path, cli: Cli, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "new.csv", TEXTS[:2])
    (tmp_path / "link.csv").symlink_to(source)
    before = source.read_bytes()
    for target in (source, tmp_path / "link.csv"):
        ended = cli("predict", str(run), str(source), "-o", str(target))
        assert ended.code == 2 and "is the input file" in ended.flat
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected texts or a file to label, got none"),
        (("nowhere.csv",), "the file nowhere.csv does not exist"),
        (("new.csv", "more"), "expected one file or texts, got 2 arguments"),
        (("new.csv", "-o", "out.xlsx"), "the suffix '.xlsx' does not say"),
        (("new.csv", "--text-column", "words"), "the file has no column 'words'"),
        (("new.csv", "--text-pair-column", "id"), "the model reads one text of a row"),
        (("new.csv", "--json"), "--json is for texts"),
        (("a text", "-o", "out.csv"), "--output has no effect without a FILE"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: tuple[str, ...],
    expected: str,
    run: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_csv(tmp_path / "new.csv", TEXTS[:2])
    monkeypatch.chdir(tmp_path)
    ended = cli("predict", str(run), *arguments)
    assert ended.code == 2
    assert expected in ended.flat


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("runs/nothing", "the folder runs/nothing does not exist"),
        ("runs", "the folder runs holds no run, export or model"),
        ("my.yaml", "`sparsegrad train my.yaml` first, then give the run's folder"),
    ],
)
def test_sources_on_this_machine_that_hold_nothing_are_not_looked_for_elsewhere(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("my.yaml").write_text("model: builtin:minilm\n", encoding="utf-8")
    ended = cli("predict", source, "a text")
    assert ended.code == 2 and said in ended.flat


def test_sources_that_are_no_classifiers_are_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    body = cli("predict", str(run.parent / "base"), "a text")
    assert (body.code, "expected a classifier, got BertForMaskedLM" in body.flat) == (2, True)
    missing = cli("predict", "./nowhere", "a text")
    assert missing.code == 2


def test_peft_folders_of_other_tools(
    run: Path, expected: torch.Tensor, cli: Cli, tmp_path: Path
) -> None:
    """The folder itself does not name its labels; without a head it is refused."""
    folder = tmp_path / "lora"
    assert cli("export", str(run), "--to", "lora", "-o", str(folder), "-q").code == 0
    (folder / "export.json").unlink()
    ended = cli("predict", str(folder), *TEXTS, "--max-length", "16")
    assert "it does not name its labels: they are LABEL_0, LABEL_1" in ended.flat
    found = [line.split("\t")[0] for line in ended.out.strip().split("\n")]
    assert found == [f"LABEL_{int(b > a)}" for a, b in expected.tolist()]
    tensors = load_file(folder / "adapter_model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(body, folder / "adapter_model.safetensors")
    headless = cli("predict", str(folder), "a text")
    assert (headless.code, "an adapter without the head of a classifier" in headless.flat) == (
        2,
        True,
    )
