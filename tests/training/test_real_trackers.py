"""A run and its continuation in the real packages: where the data is, and what it says.

tensorboard is installed for tests, since it is small (55 MB). The others are tested where they are
installed (`pip install 'sparsegrad[wandb]'`), and skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.small_runs import base_folder, data_folder, train
from support.small_runs import record as read_record
from support.tiny_models import one_thread

from sparsegrad_cli.recipe.trackers import EXTRAS

SECRET = "0123456789abcdef0123456789abcdef01234567"  # In the form of a key of wandb.
MORE = (
    *("method=lora", "train.logging_steps=1", "train.save_total_limit=5"),
    *("train.project=trials", "train.run_name=night"),
)
Logged = list[tuple[int, float]]  # (step, training loss), in the order of logging.


def tensorboard_losses(run: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"eval/score", "eval/loss", "train/learning_rate"} <= set(events.Tags()["scalars"])
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def wandb_records(file: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), 7, b""  # Seven bytes of header.
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # The end of a block is filled with zeros.
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            yield parts
            parts = b""


def wandb_losses(run: Path) -> Logged:
    from wandb.proto.wandb_internal_pb2 import Record

    folders, found = sorted((run / "wandb").glob("offline-run-*")), []
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for data in wandb_records(file):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                assert record.run.project == "trials" and record.run.display_name == "night"
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train/loss" in items:
                found.append((int(items["train/global_step"]), float(items["train/loss"])))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # One run, two parts.
    return found


def mlflow_losses(run: Path) -> Logged:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("trials")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name == "night" and tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "loss")
    return [(metric.step, metric.value) for metric in sorted(history, key=lambda m: m.step)]


def trackio_losses(run: Path) -> Logged:
    (file,) = (run / "trackio").glob("trials*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"night"}
    values = [json.loads(text) for _, text in rows]
    return [(v["train/global_step"], v["train/loss"]) for v in values if "train/loss" in v]


READERS: dict[str, Callable[[Path], Logged]] = {
    "mlflow": mlflow_losses,
    "tensorboard": tensorboard_losses,
    "trackio": trackio_losses,
    "wandb": wandb_losses,
}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_continued_run_is_one_run_in_its_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for key in [k for k in os.environ if k.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(key)
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    home, here, run = tmp_path / "home", tmp_path / "here", tmp_path / "run"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(here)
    settings = (*MORE, f"train.report_to={name}")
    with one_thread():
        train(run, base, data, *settings, stop=True)
        shutil.rmtree(run / "checkpoint-6")  # As if it was killed after step 6.
        train(run, base, data, *settings, resume=True)
    assert not files_of(home) and not files_of(here)
    assert capsys.readouterr().out == ""
    logged = READERS[name](run)
    losses = {x["step"]: x["loss"] for x in read_record(run)["metrics"]["train"]}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    again = [] if name == "tensorboard" else [4, 5, 6]  # It hides what was logged after step 3.
    assert sorted(step for step, _ in logged) == sorted([*losses, *again])
    for step, value in logged:
        assert value == pytest.approx(losses[step], rel=1e-5)
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
