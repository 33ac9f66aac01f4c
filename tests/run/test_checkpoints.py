"""Checkpoint folders: damage is detected, and the only good checkpoint is never removed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.run.checkpoint_state import CheckpointState, Progress, write_state
from sparsegrad_cli.run.checkpoints import (
    MANIFEST,
    Checkpoints,
    best_of,
    check_ours,
    checkpoints,
    damage,
    last_checkpoint,
    step_of,
    with_check,
)

RECIPE = "a recipe's digest"


def fill_of(best: int | None = None) -> Callable[[Path], None]:
    """Return a function that writes the files of a checkpoint."""

    def fill(folder: Path) -> None:
        (folder / "trainable.safetensors").write_bytes(b"w" * 1000)
        progress = Progress(step=9, max_steps=9, best_step=best)
        state = CheckpointState(
            progress=progress, optimizer_groups=[], optimizer_numbers={}, scheduler={}, random=[]
        )
        write_state(folder, state)

    return fill


def checkpoints_in(
    folder: Path, limit: int | None = None, *, keep_best: bool = False
) -> Checkpoints:
    return Checkpoints(folder, RECIPE, limit=limit, keep_best=keep_best)


def put(folder: Path, *steps: int, best: int | None = None) -> None:
    for step in steps:
        checkpoints_in(folder).write(step, fill_of(best), None)


def names(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.iterdir()), key=lambda name: (len(name), name))


def found(folder: Path, *, keep_best: bool = False) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    chosen = checkpoints_in(folder, keep_best=keep_best).find(notes.append)
    return (chosen.name if chosen else None), notes


# --- which one is the newest


def test_newest_checkpoint_is_chosen_by_step(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None and found(tmp_path) == (None, [])
    put(tmp_path, 9, 10, 200)
    for number, step in enumerate((200, 10, 9)):  # the oldest was touched last
        os.utime(tmp_path / f"checkpoint-{step}", (4e9 + number, 4e9 + number))
    assert found(tmp_path) == ("checkpoint-200", [])
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [9, 10, 200]
    shutil.rmtree(tmp_path / "checkpoint-200")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-", "checkpoint-1.5", "checkpoint-²"])
def test_other_folders_are_ignored(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    (tmp_path / "checkpoint-7").write_text("a file")
    assert found(tmp_path) == ("checkpoint-1", [])
    assert (tmp_path / name).is_dir() and (tmp_path / "checkpoint-7").is_file()


# --- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    """Overwrite a file with zeros, as a power cut may leave it."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage_file", [cut, flip, remove, zeros])
@pytest.mark.parametrize("name", ["trainable.safetensors", "state.json", MANIFEST])
def test_damaged_checkpoint_is_skipped_for_the_previous_one(
    tmp_path: Path, damage_file: Callable[[Path], None], name: str
) -> None:
    put(tmp_path, 2, 4, 6)
    damage_file(tmp_path / "checkpoint-6" / name)
    chosen, notes = found(tmp_path)
    assert chosen == "checkpoint-4"
    assert notes[0].startswith("checkpoint-6 is damaged: ") and name in notes[0]
    assert notes[1] == "checkpoint-4 is used, the newest whole checkpoint"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"files": 3}'])
def test_invalid_manifest_means_damaged(tmp_path: Path, text: str) -> None:
    put(tmp_path, 1)
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(text)
    assert damage(tmp_path / "checkpoint-1") is not None
    contents: list[Any] = [{}, [], {"state.json": {}}, {"state.json": None}, {"no": {"bytes": 1}}]
    for files in contents:
        content = with_check({"format": 1, "recipe": RECIPE, "files": files})
        (tmp_path / "checkpoint-1" / MANIFEST).write_text(json.dumps(content))
        assert damage(tmp_path / "checkpoint-1") is not None


def test_training_restarts_without_an_undamaged_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, 2, 4)
    for step in (2, 4):
        cut(tmp_path / f"checkpoint-{step}" / "state.json")
    chosen, notes = found(tmp_path)
    assert chosen is None and len(notes) == 3
    assert notes[-1] == "no whole checkpoint is left: training starts again"


def test_checkpoint_with_a_damaged_best_is_skipped(tmp_path: Path) -> None:
    put(tmp_path, 2)
    put(tmp_path, 4, best=4)
    put(tmp_path, 6, 8, best=4)
    assert best_of(tmp_path / "checkpoint-6") == tmp_path / "checkpoint-4"
    assert found(tmp_path, keep_best=True)[0] == "checkpoint-8"
    cut(tmp_path / "checkpoint-4" / "trainable.safetensors")
    chosen, notes = found(tmp_path, keep_best=True)
    assert chosen == "checkpoint-2"
    assert "checkpoint-8 is damaged: its best checkpoint, checkpoint-4" in notes[0]
    assert (
        found(tmp_path)[0] == "checkpoint-8"
    )  # the best is not needed if the run ends with its last


# --- ownership


def rewrite(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["check"]
    (folder / MANIFEST).write_text(json.dumps(with_check(manifest | changes)))


def test_other_recipes_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    put(tmp_path, 2)
    Checkpoints(tmp_path, "another", limit=None).write(4, fill_of(), None)
    with pytest.raises(UsageError, match="checkpoint-4 belongs to another recipe"):
        found(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_other_format_is_refused_with_its_version(tmp_path: Path) -> None:
    put(tmp_path, 2, 4)
    rewrite(tmp_path / "checkpoint-4", format=7, versions={"sparsegrad": "9.1"}, files="other")
    with pytest.raises(FileFormatError, match=r"format 7, written by sparsegrad 9\.1") as caught:
        found(tmp_path)
    assert "--overwrite" in str(caught.value.fix)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_checkpoint_of_other_package_versions_is_used_with_a_note(tmp_path: Path) -> None:
    put(tmp_path, 2)
    assert check_ours(tmp_path / "checkpoint-2", RECIPE) == []
    rewrite(tmp_path / "checkpoint-2", versions={"torch": "1.13"})
    chosen, notes = found(tmp_path)
    assert chosen == "checkpoint-2" and len(notes) == 1
    assert "was written by other versions" in notes[0] and "torch 1.13 then" in notes[0]


# --- limits


@pytest.mark.parametrize("limit", [1, 2, 3, None])
@pytest.mark.parametrize("best", [None, 2, 6])
def test_newest_and_best_checkpoints_are_always_kept(
    tmp_path: Path, limit: int | None, best: int | None
) -> None:
    kept_in = checkpoints_in(tmp_path, limit)
    for step in range(1, 10):
        there = best if best is not None and step >= best else None
        kept_in.write(step, fill_of(there), tmp_path / f"checkpoint-{there}" if there else None)
        assert damage(tmp_path / f"checkpoint-{step}") is None
    left = {step_of(folder) for folder in checkpoints(tmp_path)}
    newest = set(range(1, 10)) if limit is None else set(range(10 - limit, 10))
    assert {9} <= left and (best is None or best in left)
    assert len(left) == (9 if limit is None else max(limit, len({9, best} - {None})))
    assert left - {best} <= newest


RANDOM = Path("/proc/sys/kernel/random/uuid")


@pytest.mark.skipif(not RANDOM.is_file(), reason="needs a file that never reads the same twice")
def test_nothing_is_removed_for_a_checkpoint_that_reads_back_wrong(tmp_path: Path) -> None:
    kept_in = checkpoints_in(tmp_path, 1)
    kept_in.write(2, fill_of(), None)

    def fill(folder: Path) -> None:
        fill_of()(folder)
        (folder / "optimizer.safetensors").symlink_to(RANDOM)

    with pytest.raises(DiskError, match=r"reads back differently: the checksum of optimizer"):
        kept_in.write(4, fill, None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert found(tmp_path)[0] == "checkpoint-2"


def test_damaged_checkpoints_are_removed_after_a_newer_good_one(tmp_path: Path) -> None:
    put(tmp_path, 2, 4, 6)
    cut(tmp_path / "checkpoint-4" / "state.json")
    cut(tmp_path / "checkpoint-6" / "state.json")
    kept_in = checkpoints_in(tmp_path, 1)
    assert kept_in.find(lambda note: None) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    kept_in.write(5, fill_of(), None)
    assert names(tmp_path) == [
        "checkpoint-5",
        "checkpoint-6",
    ]  # that checkpoint is ahead of the run
    kept_in.write(6, fill_of(), None)
    assert names(tmp_path) == ["checkpoint-6"] and damage(tmp_path / "checkpoint-6") is None


def test_leftovers_of_a_kill_are_removed_on_resume(tmp_path: Path) -> None:
    put(tmp_path, 2, 4, 6)
    for ending in ("partial", "before", "removed"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-2.{ending}")
    (tmp_path / "checkpoint-6").replace(tmp_path / "checkpoint-6.before")  # between two renames
    assert found(tmp_path) == ("checkpoint-6", [])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_limit_of_one_keeps_the_best_at_the_end(tmp_path: Path) -> None:
    put(tmp_path, 2, 4, 6)
    checkpoints_in(tmp_path, 2).finish(tmp_path / "checkpoint-4")
    assert len(names(tmp_path)) == 3
    checkpoints_in(tmp_path, 1).finish(None)
    checkpoints_in(tmp_path, 1).finish(tmp_path / "checkpoint-9")  # it is gone: nothing is better
    assert len(names(tmp_path)) == 3
    checkpoints_in(tmp_path, 1).finish(tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4"]
