"""Several labels a row, on a mixture, in two processes: the scores and threshold of one process."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import base_folder, record, sentences
from support.task_data import load_task
from support.tiny_models import one_thread
from support.warm_python import run_two_ranks

from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.task_section import SourceSection
from sparsegrad_cli.training.train import train

BATCH = 8


def write(path: Path, seed: int, count: int, *, short: bool) -> Path:
    """Write texts with the labels early and late, and with ``short`` also short."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for text, _ in sentences(seed, count):
            labels = ["early"] * (text[0] < "n") + ["late"] * (text[-1] >= "n")
            writer.writerow([text, "|".join(labels + ["short"] * (short and len(text) < 6))])
    return path


def place(folder: Path) -> Path:
    """Make a model and two sources; only the second one has the label short."""
    # Each process draws dropout masks of its own.
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base_folder(folder / "base", **still)
    write(folder / "one" / "train.csv", 1, 40, short=False)
    # An odd number of rows, which two processes cannot halve.
    write(folder / "one" / "validation.csv", 2, 23, short=False)
    write(folder / "two.csv", 3, 40, short=True)
    return folder


def trained(folder: Path, run: str, size: int, rows: int) -> Path:
    settings = (
        f"model={folder / 'base'}",
        "method=full",
        "task={name: csv, type: multilabel, label_separator: '|', max_length: 16}",
        f"task.mix=[{{path: {folder / 'one'}, weight: 2}}, {folder / 'two.csv'}]",
        "train.class_weights=balanced",
        "train.learning_rate=3e-2",
        "train.adam_epsilon=1e-3",  # Rounding of gradients close to zero stays small.
        "train.max_steps=6",
        "train.eval_strategy=steps",
        "train.eval_steps=3",
        "train.use_cpu=true",
        f"train.per_device_train_batch_size={size}",
        f"train.per_device_eval_batch_size={rows}",
        f"output_dir={folder / run}",
    )
    train(load_recipe(None, settings))
    return folder / run


def one_of_two(rank: int, folder: str) -> None:
    """Start what ``accelerate launch`` starts in each of two processes."""
    said = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in said.items()}, HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    trained(Path(folder), "two-processes", BATCH // 2, 4)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # The interpreter's own exit races with gloo's threads.


def test_two_processes_give_the_scores_and_the_threshold_of_one(
    tmp_path: Path, warm_client: str
) -> None:
    folder = place(tmp_path)
    run_two_ranks(warm_client, one_of_two, folder)
    with one_thread():
        alone = record(trained(folder, "alone", BATCH, 16))
    both = record(folder / "two-processes")
    assert (alone["processes"], both["processes"]) == (1, 2)
    task = both["task"]
    assert task == alone["task"] and task["label_names"] == ["early", "late", "short"]
    taken = {source["name"]: source["taken"] for source in task["sources"]}
    assert taken == {"one": 40, "two": 20}
    histories = both["metrics"]["history"], alone["metrics"]["history"]
    for one, other in zip(*histories, strict=True):
        assert one["step"] == other["step"] and 0 < other["threshold"] < 1
        assert one["threshold"] == pytest.approx(other["threshold"], abs=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["values"]["validation"] == pytest.approx(other["values"]["validation"], abs=1e-6)


def test_a_mixture_has_the_labels_of_all_its_sources(tmp_path: Path) -> None:
    folder = place(tmp_path)
    mix = (SourceSection(path=str(folder / "one")), SourceSection(path=str(folder / "two.csv")))
    found = load_task("csv", mix=mix, type="multilabel", label_separator="|")
    assert found.spec.label_names == ("early", "late", "short")
    labels = dict(zip(found.train["text"], found.train["label"], strict=True))
    for seed, short in ((1, False), (3, True)):
        for text, _ in sentences(seed, 40):
            expected = [text[0] < "n", text[-1] >= "n", short and len(text) < 6]
            assert labels.get(text, expected) == expected
    sizes = {source.name: (source.rows, source.taken) for source in found.sources}
    assert sizes == {"one": (40, 36), "two": (36, 36)}
