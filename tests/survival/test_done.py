"""Finished runs stay finished, and records survive a failed resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.survival_runs import Workspace, flat, record, weights

from sparsegrad_cli.errors import DownloadError
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, digest, load_recipe, to_yaml
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run import open_run
from sparsegrad_cli.run.folder import ADAPTER

BLOCKS = {
    "metrics": {"best": {"step": 4, "score": 0.9}},
    "method": {"name": "lora"},
    "counts": {"note": ""},
}
ENDED: dict[str, Any] = {"status": "done", "error": None, "started": "then", "finished": "then"}
ENDED |= {"command": "train", "schema": 1}


class Notes(Observer):
    """Collects notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of reported runs instead of writing reports, which takes long."""
    written: list[str] = []

    def write(writer: RunWriter, observer: Observer) -> None:
        written.append(writer.path.name)
        for name in ("report.md", "report.html"):
            (writer.path / name).write_text("")

    monkeypatch.setattr(open_run, "write_report", write)
    return written


def run_in(folder: Path, **changes: Any) -> LoadedRecipe:
    """Make a run folder with text in place of tensors."""
    loaded = load_recipe(None, ("method=lora", "train.use_cpu=true"), output_dir=folder)
    (folder / ADAPTER).parent.mkdir(parents=True)
    (folder / ADAPTER).write_text("tensors")
    (folder / "recipe.yaml").write_text(to_yaml(loaded.recipe))
    content = ENDED | BLOCKS | {"recipe_digest": digest(loaded.recipe)} | changes
    (folder / "run.json").write_text(json.dumps(content))
    return loaded


def resume(loaded: LoadedRecipe, work: Any, observer: Observer | None = None) -> dict[str, Any]:
    with open_run.open_run(loaded, "train", observer, resume=True) as run:
        if not run.done:
            work(run)
    return run.writer.record.to_json()


def unreachable(run: open_run.Run) -> None:
    raise DownloadError("the hub cannot be reached", where="model.name")


def test_finished_run_is_not_changed_by_resume(tmp_path: Path, reports: list[str]) -> None:
    """A moved run records its new path. Its report is written if missing, and only then."""
    loaded, notes = run_in(tmp_path / "run", output_dir="elsewhere"), Notes()
    before = (tmp_path / "run" / "run.json").read_bytes()
    for _ in range(2):
        found = resume(loaded, unreachable, notes)
        assert found == record(tmp_path / "run") | {"output_dir": str(tmp_path / "run")}
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert reports == ["run"] and all("the run is done" in text for text in notes.said)


def test_run_without_its_adapter_is_not_finished(tmp_path: Path, reports: list[str]) -> None:
    loaded = run_in(tmp_path / "run")
    (tmp_path / "run" / ADAPTER).unlink()
    with pytest.raises(DownloadError):
        resume(loaded, unreachable)
    assert not reports


@pytest.mark.parametrize("status", ["interrupted", "failed", "running", "out_of_memory"])
def test_record_survives_a_failed_resumption(
    tmp_path: Path, reports: list[str], status: str
) -> None:
    old = {"title": "Old", "what": "old", "where": None, "fix": None}
    loaded = run_in(tmp_path / "run", status=status, error=old)
    with pytest.raises(DownloadError):
        resume(loaded, unreachable)
    found = record(tmp_path / "run")
    assert found["status"] == "failed" and found["error"]["what"] == "the hub cannot be reached"
    assert {name: found[name] for name in BLOCKS} == BLOCKS and not reports
    seen: list[dict[str, Any]] = []

    def goes_well(run: open_run.Run) -> None:
        seen.append(record(tmp_path / "run"))

    resume(loaded, goes_well)
    (within,) = seen
    assert [within[key] for key in ("status", "error", "finished")] == ["running", None, None]
    assert within["started"] != "then"
    found = record(tmp_path / "run")
    assert (found["status"], found["error"]) == ("done", None) and found["finished"] != "then"
    assert reports == ["run"]


def test_training_does_not_continue_the_record_of_a_calibration(
    tmp_path: Path, reports: list[str]
) -> None:
    loaded = run_in(tmp_path / "run", command="calibrate")
    resume(loaded, lambda run: None)
    assert record(tmp_path / "run")["command"] == "train"
    assert not BLOCKS.keys() & record(tmp_path / "run").keys()


def test_finished_run_is_trained_again_only_without_its_adapter(
    workspace: Workspace,
) -> None:
    """It resumes from its best checkpoint, and the record of the earlier end is removed."""
    whole, run = workspace.uninterrupted_run("full"), workspace.new_run()
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ended = workspace.train("full", run, "--resume", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["metrics"] == record(whole)["metrics"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "the run is done" in flat(workspace.train("full", run, "--resume"))
    shutil.rmtree(run / "adapter")
    assert workspace.train("full", run, "--resume", point="step").code == -9
    found = record(run)
    assert found["resumed_from"] == 4 and found["method"] == record(whole)["method"]
    assert not {"metrics", "memory", "time", "sizes", "sparsity"} & found.keys()
    assert workspace.train("full", run, "--resume").code == 0
    assert weights(run) == weights(whole)
