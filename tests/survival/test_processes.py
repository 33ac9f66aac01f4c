"""Two distributed processes are killed, stopped, refused and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.folder_lock_process import lock_holder, read_process_id
from support.kill_process import ProcessResult
from support.nan_row import NAN_ROW, data_with_nan_row, seed_where, set_infinite_embedding
from support.small_runs import ROWS, base_folder
from support.survival_runs import Workspace, flat, largest_file, record, weights
from torch import Tensor

from sparsegrad_cli.io.locks import owner_of
from sparsegrad_cli.run.checkpoints import checkpoints

MORE = ("train.max_steps=6",)


def both(
    workspace: Workspace, method: str, run: Path, *flags: str, **point: Any
) -> list[ProcessResult]:
    settings = workspace.settings(method, *MORE)
    return workspace.fork_server.run_two("train", *settings, "-o", str(run), *flags, **point)


def adapter(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(adapter_path(run))
    return found


def codes(ended: list[ProcessResult]) -> list[int]:
    return [one.code for one in ended]


def check_same(workspace: Workspace, method: str, run: Path, after: int) -> None:
    """Check that a resumed run equals an uninterrupted one, which is trained here."""
    whole = workspace.new_run()
    assert codes(both(workspace, method, whole)) == [0, 0]
    mine, theirs = record(run), record(whole)
    assert (mine["processes"], mine["resumed_from"]) == (2, after)
    assert weights(run) == weights(whole)
    assert mine["metrics"] == theirs["metrics"] and mine["hashes"] == theirs["hashes"]
    assert not (run / ".lock").exists()


def test_killed_processes_resume_bit_for_bit_with_their_random_states(
    workspace: Workspace,
) -> None:
    """Each process has its own dropout masks and its own loss sum since the last log."""
    run = workspace.new_run()
    assert codes(both(workspace, "lora", run, point="step", count=7, of=1)) == [-9, -9]
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"] and owner_of(run) is None
    alone = workspace.fork_server.run(
        "train", *workspace.settings("lora", *MORE), "-o", str(run), "--resume"
    )
    assert alone.code == 2
    assert "written by a run in 2 processes, and this run has 1" in flat(alone)
    assert codes(both(workspace, "lora", run, "--resume")) == [0, 0]
    check_same(workspace, "lora", run, 2)


def test_ctrl_c_in_one_process_stops_both_after_the_same_step(
    workspace: Workspace,
) -> None:
    run = workspace.new_run()
    ended = both(workspace, "core static", run, point="interrupted", count=8, of=1)
    assert codes(ended) == [130, 130]
    assert record(run)["status"] == "interrupted" and not (run / ".lock").exists()
    assert "stopped after step 3 of 6; checkpoint-3 is saved" in flat(ended[0])
    assert codes(both(workspace, "core static", run, "--resume")) == [0, 0]
    check_same(workspace, "core static", run, 3)


def test_two_processes_train_one_model(workspace: Workspace, tmp_path: Path) -> None:
    """Two processes with one batch each make the update of one with both, up to rounding."""
    base = base_folder(tmp_path / "base", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    more = (
        f"model={base}",
        "train.max_steps=2",
        "train.gradient_accumulation_steps=2",
        "train.per_device_eval_batch_size=7",
    )
    run, alone, small = (tmp_path / name for name in ("run", "alone", "small"))
    settings = workspace.settings("full", *more)
    assert codes(workspace.fork_server.run_two("train", *settings, "-o", str(run))) == [0, 0]
    assert workspace.fork_server.run("train", *settings, "-o", str(small)).code == 0
    settings = workspace.settings("full", *more, "train.per_device_train_batch_size=10")
    assert workspace.fork_server.run("train", *settings, "-o", str(alone)).code == 0
    found, wanted, other = (adapter(place) for place in (run, alone, small))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any((other[name] - wanted[name]).abs().max() > 1e-2 for name in wanted)
    # Rows that pad the last batch count once.
    found_first, wanted_first = (record(place)["metrics"]["initial"] for place in (run, alone))
    assert ROWS % 14 != 0
    assert found_first["loss"] == pytest.approx(wanted_first["loss"], rel=1e-6)
    assert found_first["values"] == wanted_first["values"]


def test_locked_folder_is_refused_by_both_with_one_message(workspace: Workspace) -> None:
    run = workspace.new_run()
    run.mkdir()
    with lock_holder(run) as process:
        read_process_id(process)
        ended = both(workspace, "full", run)
    assert codes(ended) == [2, 2]
    assert f"is in use by process {process.pid}" in flat(ended[0])
    assert "in use" not in ended[1].err


def test_nan_loss_in_one_process_ends_both(workspace: Workspace, tmp_path: Path) -> None:
    """The first process writes the record; the other one has the row with the NaN loss."""
    base, data = base_folder(tmp_path / "base"), data_with_nan_row(workspace, tmp_path / "data")
    set_infinite_embedding(base)
    # The processes take batches in turn, three per step each.
    seed, order = seed_where(lambda number: number % 2 == 1 and number // 6 == 0)
    batch = order.index(NAN_ROW) // 5
    settings = workspace.settings(
        "full",
        f"model={base}",
        f"task.path={data}",
        f"seed={seed}",
        "train.train_sampling_strategy=random",
    )
    ended = workspace.fork_server.run_two("train", *settings, "-o", str(tmp_path / "run"))
    assert codes(ended) == [1, 1]
    found = record(tmp_path / "run")
    assert found["status"] == "failed" and found["error"]["step"] == 1
    assert "loss of another process is NaN or infinite at step 1" in flat(ended[0])
    said = flat(ended[1])
    assert "(process 1)" in said and f"step 1, batch {batch // 2 + 1} of 3" in said
    assert "first not finite: bert.embeddings.word_embeddings" in said


def test_full_disk_in_the_first_process_ends_both(workspace: Workspace) -> None:
    run = workspace.new_run()
    small = largest_file(workspace.uninterrupted_run("full")) // 2048
    ended = both(workspace, "full", run, point="small-files", count=small, of=0)
    assert codes(ended) == [1, 1]
    assert "checkpoint-2 could not be written" in flat(ended[0])
    assert record(run)["status"] == "failed" and checkpoints(run) == []
