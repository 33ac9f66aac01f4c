"""`sparsegrad predict --glue`: the files that gluebenchmark.com takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_runs import Cli

from sparsegrad_cli.data.glue_test_splits import HiddenSplit, load_test_splits
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.predict import glue_submission
from sparsegrad_cli.predict.classifier import Predictions
from sparsegrad_cli.predict.glue_submission import write_submission
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import GLUE_TASKS

# Headers of the original test files, and the cells of row n.
ORIGINAL = {
    "cola": ("CoLA", "index\tsentence", "{n}\ta{n}"),
    "sst2": ("SST-2", "index\tsentence", "{n}\ta{n}"),
    "mrpc": ("MRPC", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "{n}\t7\t8\ta{n}\tb{n}"),
    "stsb": ("STS-B", "index\tgenre\tsentence1\tsentence2", "{n}\tnews\ta{n}\tb{n}"),
    "qqp": ("QQP", "id\tquestion1\tquestion2", "{n}\ta{n}\tb{n}"),
    "mnli": ("MNLI", "index\tgenre\tsentence1\tsentence2", "{n}\tx\ta{n}\tb{n}"),
    "qnli": ("QNLI", "index\tquestion\tsentence", "{n}\ta{n}\tb{n}"),
    "rte": ("RTE", "index\tsentence1\tsentence2", "{n}\ta{n}\tb{n}"),
    "wnli": ("WNLI", "index\tsentence1\tsentence2", "{n}\ta{n}\tb{n}"),
}
# By the sample submission of gluebenchmark.com: file -> predictions of class ids 0, 1, 2, 0.
NAMED = ("entailment", "not_entailment")
EXPECTED: dict[str, dict[str, list[str]]] = {
    "cola": {"CoLA.tsv": ["0", "1", "0", "1"]},
    "sst2": {"SST-2.tsv": ["0", "1", "0", "1"]},
    "mrpc": {"MRPC.tsv": ["0", "1", "0", "1"]},
    "stsb": {"STS-B.tsv": ["0.000", "1.234", "4.500", "5.000"]},
    "qqp": {"QQP.tsv": ["0", "1", "0", "1"]},
    "mnli": {
        name: ["entailment", "neutral", "contradiction", "entailment"]
        for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv")
    },
    "qnli": {"QNLI.tsv": [*NAMED, *NAMED]},
    "rte": {"RTE.tsv": [*NAMED, *NAMED]},
    "wnli": {"WNLI.tsv": ["0", "1", "0", "1"]},
}
ROWS = 4


def write_test_files(folder: Path, task: str, rows: int = ROWS) -> Path:
    """Write the test files of a task in the original layout; the rows are out of order."""
    name, header, cells = ORIGINAL[task]
    (folder / name).mkdir(parents=True)
    numbers = [*range(1, rows), 0]
    text = "\n".join([header, *(cells.format(n=n) for n in numbers)]) + "\n"
    for split in ("test_matched", "test_mismatched") if task == "mnli" else ("test",):
        (folder / name / f"{split}.tsv").write_text(text)
    if task == "mnli":
        (folder / "diagnostic").mkdir()
        text = text.replace("\tgenre", "").replace("\tx\t", "\t")
        (folder / "diagnostic" / "diagnostic.tsv").write_text(text)
    return folder


class Fixed:
    """Answers row n of a file with class n, or the n-th score, and checks the texts."""

    def __init__(self, task: str, path: Path | None) -> None:
        spec = GLUE_TASKS[task]
        self.task = TaskSection(name=f"glue/{task}", path=str(path) if path else None)
        self.label_names, self.columns = spec.label_names, len(spec.text_columns)

    def predict(self, texts: list[list[str]], batch_size: int, done: Any = None) -> Predictions:
        assert texts == [[f"{letter}{n}" for n in range(ROWS)] for letter in "ab"[: self.columns]]
        if self.label_names is None:
            return Predictions(np.array([[-0.2], [1.2342], [4.5], [5.1]]), [])
        count = len(self.label_names)
        return Predictions(np.eye(count)[[n % count for n in range(ROWS)]], [])


@pytest.mark.parametrize("task", ORIGINAL)
def test_files_have_the_names_columns_and_labels_of_glue(task: str, tmp_path: Path) -> None:
    classifier: Any = Fixed(task, write_test_files(tmp_path / "glue", task))
    written, notes = write_submission(classifier, tmp_path / "out", batch_size=2)
    assert notes == []
    assert {path.name: path.read_text().splitlines() for path in written} == {
        name: ["index\tprediction", *(f"{n}\t{answer}" for n, answer in enumerate(answers))]
        for name, answers in EXPECTED[task].items()
    }
    assert set(written.values()) == {ROWS}


def test_long_splits_are_answered_in_chunks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(glue_submission, "CHUNK", 3)
    sizes: list[int] = []

    class Zeros(Fixed):
        def predict(self, texts: list[list[str]], batch_size: int, done: Any = None) -> Predictions:
            sizes.append(len(texts[0]))
            return Predictions(np.eye(2)[[0] * len(texts[0])], [])

    classifier: Any = Zeros("rte", write_test_files(tmp_path / "glue", "rte", rows=8))
    (path,), _ = write_submission(classifier, tmp_path / "out", batch_size=2)
    assert sizes == [3, 3, 2] and len(path.read_text().splitlines()) == 9


def test_what_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = write_test_files(tmp_path / "glue", "rte")
    (folder / "RTE" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n0\ta\tb\n")
    with pytest.raises(SparsegradError, match="indices 0 to 1, each once, got '0'"):
        load_test_splits("rte", folder)
    (folder / "RTE" / "test.tsv").unlink()
    with pytest.raises(SparsegradError) as caught:
        load_test_splits("rte", folder)
    assert "glue/rte has no test file in" in caught.value.what and "test.tsv" in str(caught.value)
    (folder / "MNLI").mkdir()
    for name in ("test_matched", "test_mismatched"):
        (folder / "MNLI" / f"{name}.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    splits, notes = load_test_splits("mnli", folder)
    assert [split.file for split in splits] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    assert splits[0] == HiddenSplit("MNLI-m.tsv", [["a"], ["b"]])
    assert notes == ["AX.tsv is not written: the diagnostic set is not there"]


@pytest.mark.parametrize("name", ["csv", None])
def test_other_tasks_are_refused(name: str | None, tmp_path: Path) -> None:
    classifier: Any = Fixed("rte", None)
    classifier.task = None if name is None else TaskSection(name=name)
    with pytest.raises(SparsegradError) as caught:
        write_submission(classifier, tmp_path, batch_size=2)
    assert "--glue needs a run of a GLUE task, got" in caught.value.what
    assert caught.value.fix and "glue/cola" in caught.value.fix


def test_options_without_effect_are_refused(cli: Cli) -> None:
    refused = cli("predict", "runs/x", "--glue", "a text")
    assert (refused.code, "--glue labels the test split of the run's task" in refused.flat) == (
        2,
        True,
    )
    assert cli("predict", "runs/x", "--glue", "--probabilities").code == 2
