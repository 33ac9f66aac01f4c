"""More epochs or steps for a finished run: equal to the longer run if the schedule allows."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.survival_runs import Workspace, flat, record, results, weights

METHODS = {
    "core": ("method.form=core", "method.density=0.05", "method.rank=7", "calibration.steps=2"),
    "lora": ("method=lora", "method.rank=2", "method.dropout=0.1"),
}


COMMON = (
    "task=csv",
    "task.max_length=16",
    "train.per_device_train_batch_size=16",
    "train.learning_rate=1e-2",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.logging_steps=2",
    "train.use_cpu=true",
)

TWO = ("train.num_train_epochs=2",)


def train(workspace: Workspace, run: Path, method: str, *more: str) -> None:
    folders = (f"model={workspace.base}", f"task.path={workspace.data}", "-o", str(run))
    ended = workspace.fork_server.run("train", *COMMON, *METHODS[method], *more, *folders)
    assert ended.code == 0, ended.err


def resume(workspace: Workspace, run: Path, *more: str) -> tuple[int, str]:
    """Return the exit code and the notes."""
    ended = workspace.fork_server.run("train", str(run), "--resume", *more)
    return ended.code, flat(ended)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("short", "long"),
    [
        (("train.num_train_epochs=2",), ("train.num_train_epochs=4",)),
        (
            ("train.max_steps=5", "train.eval_strategy=steps", "train.eval_steps=5"),
            ("train.max_steps=10",),
        ),
    ],
)
def test_extended_run_equals_the_longer_run_bit_for_bit(
    workspace: Workspace, method: str, short: tuple[str, ...], long: tuple[str, ...]
) -> None:
    run, whole = workspace.new_run(), workspace.new_run()
    train(workspace, whole, method, *short, *long)
    train(workspace, run, method, *short)
    code, said = resume(workspace, run, *long)
    assert code == 0, said
    assert "extended from" in said and "the same for any length" in said
    assert weights(run) == weights(whole)
    mine, theirs = results(record(run)), results(record(whole))
    for each in (mine, theirs):
        each["task"].pop("notes")  # name the file of a key
    assert mine == theirs
    assert record(run)["recipe_digest"] == record(whole)["recipe_digest"]
    assert len(record(run)["extended"]) == 1
    code, said = resume(workspace, run)
    assert code == 0 and "the run is done" in said


def test_schedule_that_depends_on_the_end_is_recomputed_with_a_note(workspace: Workspace) -> None:
    run = workspace.new_run()
    train(workspace, run, "lora", *TWO, "train.lr_scheduler_type=linear", "train.logging_steps=1")
    code, said = resume(workspace, run, "train.num_train_epochs=4")
    assert code == 0, said
    assert "linear is recomputed over 12 steps" in said
    rates = {r["step"]: r["learning_rate"] for r in record(run)["metrics"]["train"]}
    for step in range(record(run)["resumed_from"] + 1, 13):
        assert rates[step] == pytest.approx(1e-2 * (13 - step) / 12)


def test_other_changes_are_refused_and_the_run_stays_finished(workspace: Workspace) -> None:
    run = workspace.new_run()
    train(workspace, run, "lora", *TWO)
    before = (run / "run.json").read_bytes()
    for settings, words in (
        (("train.num_train_epochs=4", "seed=1"), "seed was 42, now 1"),
        (("train.num_train_epochs=4", "train.learning_rate=1"), "train.learning_rate was 0.01"),
        (("train.num_train_epochs=1",), "can be extended, not shortened"),
        (("train.max_steps=3",), "train.max_steps was 6, now 3"),
        (("train.num_train_epochs=9", "train.max_steps=9"), "has no effect"),
    ):
        code, said = resume(workspace, run, *settings)
        assert code == 2 and words in said, said
        assert (run / "run.json").read_bytes() == before


def test_run_with_max_steps_is_extended_by_max_steps(workspace: Workspace) -> None:
    run = workspace.new_run()
    train(workspace, run, "lora", "train.max_steps=3")
    code, said = resume(workspace, run, "train.max_steps=-1")
    assert code == 2 and "was started with train.max_steps 3" in said


def test_run_ended_by_early_stopping_is_not_extended(workspace: Workspace) -> None:
    run = workspace.new_run()
    train(
        workspace,
        run,
        "lora",
        "train.max_steps=20",
        "train.eval_strategy=steps",
        "train.eval_steps=1",
        "train.early_stopping_patience=1",
        "train.learning_rate=1e-12",
        "train.save_total_limit=9",
    )
    steps = record(run)["time"]["steps"]
    assert steps < 20
    code, said = resume(workspace, run, "train.max_steps=40")
    assert code == 0, said
    assert f"Early stopping ended it at step {steps}" in said
    assert record(run)["time"]["steps"] == steps
