"""Runs on a mixture, evaluated on several sets: what they record, and that they resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import base_folder, data_folder, record, sentences, train

from sparsegrad_cli.cli.progress import LineObserver
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document
from sparsegrad_cli.tasks.setup import make_setup, random_batches

CORE = ("method.form=core", "method.density=0.05", "method.rank=7", "train.save_total_limit=5")


def csv_of(path: Path, seed: int, count: int, mark: str = "") -> Path:
    rows = [f"{mark}{text},{label}" for text, label in sentences(seed, count)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """Return a run on 48 rows of a folder and 24 of a file, and its settings."""
    folder = tmp_path_factory.mktemp("mixed")
    base, data = base_folder(folder / "base"), data_folder(folder / "data")
    other = csv_of(folder / "other.csv", 3, 40, "zz")
    ood = csv_of(folder / "ood.csv", 4, 10)
    settings = (
        *CORE,
        "task.path=null",
        f"task.mix=[{{path: {data}, weight: 2}}, {other}]",
        f"task.evaluation={{ood: {ood}}}",
        "task.validation_fraction=0.25",
    )
    return train(folder / "run", base, data, *settings), (str(base), str(data), *settings)


def test_the_record_says_what_was_mixed_and_evaluated(run: tuple[Path, Any]) -> None:
    task = record(run[0])["task"]
    # 30 of the 40 rows of other are left for training; 2 : 1 takes all 48 of data, and 24 of them.
    assert task["sources"] == [
        {"name": "data", "weight": 2.0, "rows": 48, "taken": 48},
        {"name": "other", "weight": 1.0, "rows": 30, "taken": 24},
    ]
    assert task["train_examples"] == 72
    assert task["validation_examples"] == {"validation": 34, "ood": 10}
    assert (task["metric"], task["metric_set"]) == ("accuracy", "validation")
    for evaluation in record(run[0])["metrics"]["history"]:
        assert list(evaluation["values"]) == ["validation", "ood"]
        assert evaluation["score"] == evaluation["values"]["validation"]["accuracy"]


def test_the_report_names_sets_metrics_and_sources(run: tuple[Path, Any]) -> None:
    page = render(run_document(load_run(run[0])), "md")
    assert "validation_accuracy selects the model" in page.replace("\\_", "_")
    assert "ood_accuracy" in page.replace("\\_", "_")
    sources = page[page.index("Sources of the training data") :]
    assert "66.7 %" in sources and "33.3 %" in sources


def test_progress_lines_name_the_set(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = record(run[0])["metrics"]["history"][-1]
    with LineObserver() as observer:
        observer.evaluated(evaluation)
    share = evaluation["values"]["ood"]["accuracy"]
    assert f"ood_accuracy {100 * share:.1f}" in capsys.readouterr().err


def test_calibration_draws_from_the_mixture(run: tuple[Path, Any]) -> None:
    base, _, *settings = run[1]
    task = (f"model={base}", "task=csv", "task.max_length=16", "train.use_cpu=true")
    setup = make_setup(load_recipe(None, (*task, *settings)), Observer())
    batches = random_batches(setup, 72, seed=42)
    texts = [setup.tokenizer.decode(row) for row in next(batches)["input_ids"]]
    marked = ["zz" in text.replace(" ", "")[:2] for text in texts]
    assert len(texts) == 72 and sum(marked) == 24


def test_a_resumed_run_has_the_bits_of_the_whole_one(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    whole, (base, data, *settings) = run
    half = Path(shutil.copytree(whole, tmp_path / "half"))
    shutil.rmtree(half / "checkpoint-6")
    shutil.rmtree(half / "adapter")
    train(half, Path(base), Path(data), *settings, resume=True)
    assert record(half)["resumed_from"] == 3
    assert record(half)["metrics"]["history"] == record(whole)["metrics"]["history"]
    assert record(half)["hashes"] == record(whole)["hashes"]
    for path in (whole / "checkpoint-6").glob("*.safetensors"):
        assert (half / "checkpoint-6" / path.name).read_bytes() == path.read_bytes()
