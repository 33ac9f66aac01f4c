"""Minimal cases of faults on resume that generated inputs have found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hostile_cases import check_error, folder_content, time_limit
from support.hostile_folders import fill_folder
from support.small_runs import record
from support.stopped_run import reseal, resume_copy, stopped_run, with_stopped_run

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import BEFORE, PARTIAL, REMOVED
from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.run.checkpoints import (
    MANIFEST,
    Checkpoints,
    best_of,
    check_ours,
    damage,
    with_check,
)
from sparsegrad_cli.run.folder import lock_folder
from sparsegrad_cli.training.step_log import StepLog


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with with_stopped_run():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Copy the stopped run, for the test to damage."""
    return Path(shutil.copytree(stopped_run().run, tmp_path / "run"))


def change(run: Path, name: str, changes: Any) -> None:
    """Change a checkpoint's JSON, and recompute its manifest."""
    path = run / "checkpoint-3" / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(changes(data)))
    reseal(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "3"),
        ("step", -3),
        ("step", 3.5),
        ("max_steps", None),
        ("max_steps", 10**30),
        ("best_score", "high"),
        ("stopped_early", 1),
        ("logged_step", []),
        ("loss_sums", [["x"]]),
        ("loss_sums", 0.5),
    ],
)
def test_progress_with_wrong_types_is_refused(run: Path, key: str, value: Any) -> None:
    change(run, "state.json", lambda s: s | {"progress": s["progress"] | {key: value}})
    with pytest.raises(FileFormatError, match=f"progress.{key}.*: expected") as caught:
        resume_copy(run)
    assert "remove the checkpoint" in check_error(caught.value)
    assert str(caught.value.where).endswith("checkpoint-3/state.json")


@pytest.mark.parametrize(
    "measured",
    [
        *(None, [], {"train_s": "1"}, {"train_s": -1}, {"train_s": 1e300}),
        *({"steps_s": "ab"}, {"steps_s": [[]]}, {"memory": 3}),
    ],
)
def test_times_with_wrong_types_are_refused(run: Path, measured: Any) -> None:
    """Without a check, they would raise TypeError only at the end of training."""
    change(run, "state.json", lambda state: state | {"measured": measured})
    with pytest.raises(FileFormatError, match=r"measured.*: expected") as caught:
        resume_copy(run)
    check_error(caught.value)


def test_losses_of_fewer_processes_are_refused(run: Path) -> None:
    change(run, "state.json", lambda s: s | {"progress": s["progress"] | {"loss_sums": []}})
    with pytest.raises(FileFormatError, match="cannot continue from checkpoint-3") as caught:
        resume_copy(run)
    check_error(caught.value)


def test_deeply_nested_manifest_is_damaged(run: Path) -> None:
    (run / "checkpoint-3" / MANIFEST).write_text("[" * 5000)
    assert damage(run / "checkpoint-3") == f"{MANIFEST} is damaged"
    assert record(resume_copy(run))["resumed_from"] == 0


def test_manifest_with_invalid_versions_is_accepted_with_a_note(run: Path) -> None:
    path = run / "checkpoint-3" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["check"]
    path.write_text(json.dumps(with_check(manifest | {"versions": ["\x1b[2J" * 3000]})))
    notes = check_ours(run / "checkpoint-3", manifest["recipe"])
    assert len(notes) == 1 and "sparsegrad None then" in notes[0]


@pytest.mark.parametrize("best", [0, 10**17])
def test_checkpoint_with_a_missing_best_is_skipped(run: Path, best: int) -> None:
    change(run, "state.json", lambda s: s | {"progress": s["progress"] | {"best_step": best}})
    assert best_of(run / "checkpoint-3") == run / f"checkpoint-{best}"
    notes: list[str] = []
    digest = record(run)["recipe_digest"]
    assert Checkpoints(run, digest, limit=2, keep_best=True).find(notes.append) is None
    assert "its best checkpoint" in notes[0]
    assert Checkpoints(run, digest, limit=2).find(print) == run / "checkpoint-3"


LINES = (
    *(
        "[" * 5000,
        "7",
        '{"step": "x"}',
        '{"step": 1e999}',
        '{"step": [1]}',
        '{"loss": 1}',
        "\udcff",
    ),
    *('{"step": 1, "eval": []}', '{"step": 1, "eval": {"step": 1}}', '{"step": 1, "loss": "x"}'),
    *(
        '{"step": 1, "loss": 1}',
        '{"step": 1, "eval": {"step": 1, "score": null}}',
        '{"step": 1, "l',
    ),
)


def test_invalid_log_lines_are_removed(tmp_path: Path) -> None:
    """Invalid lines are removed, as a half-written line is; valid lines between them stay."""
    whole = [{"step": 2, "eval": {"step": 2, "score": 0.5}}]
    whole += [{"step": 3, "epoch": 1.0, "loss": 0.5, "learning_rate": 0.1}, {"step": 4}]
    path = tmp_path / "steps.jsonl"
    text = "\n".join([*LINES, *map(json.dumps, whole), *LINES])
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    log = StepLog(tmp_path, Observer())
    log.rewind(3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole[:2]
    assert [each.to_json() for each in log.evaluations] == [whole[0]["eval"]]
    assert [each.to_json() for each in log.losses] == [whole[1]]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_log_that_is_not_a_file_is_refused(run: Path, kind: str) -> None:
    (run / "steps.jsonl").unlink()
    fill_folder(run, {"steps.jsonl": kind})
    with time_limit(), pytest.raises(UsageError, match="is not a file") as caught:
        resume_copy(run)
    check_error(caught.value)


def test_pipes_in_place_of_partial_folders_do_not_block(run: Path) -> None:
    """rmtree would open the pipes and wait for a writer."""
    left = [f"checkpoint-{n}{ending}" for n in (3, 6) for ending in (PARTIAL, BEFORE, REMOVED)]
    fill_folder(run, dict.fromkeys(left, "pipe"))
    with time_limit():
        resume_copy(run)
    assert not [name for name in left if (run / name).exists()]


def test_adapter_is_not_written_through_a_link(run: Path) -> None:
    """safetensors follows a link and would create its target."""
    fill_folder(run, {"adapter": "folder"})
    outside = run.parent / "outside"
    for number, ending in enumerate((PARTIAL, PARTIAL + ".mode", "")):
        (run / "adapter" / f"adapter.safetensors{ending}").symlink_to(outside / f"new-{number}")
    before = folder_content(outside)
    resume_copy(run)
    assert folder_content(outside) == before
    assert (run / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    "words", ["[" * 4000, '{"pid": 1e999, "host": "", "since": ""}', "\0", "7"]
)
def test_lock_file_with_arbitrary_content_is_ignored(run: Path, words: str) -> None:
    (run / ".lock").write_text(words)
    assert owner_of(run) is None
    with lock_folder(run):
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
