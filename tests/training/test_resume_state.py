"""A resumed run restores fp16's loss scale, checks its origins and reads older checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import record
from support.stopped_run import reseal, resume_copy, stopped_run, with_stopped_run

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.training import accelerator as run_accelerator
from sparsegrad_cli.training import loop as training_loop


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with with_stopped_run():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a copy of a run that was stopped after step 3 of 6."""
    return Path(shutil.copytree(stopped_run().run, tmp_path / "run"))


def change_state(run: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace state.json of the checkpoint, and seal it again."""
    path = run / "checkpoint-3" / "state.json"
    path.write_text(json.dumps(changes(json.loads(path.read_text()))))
    reseal(run)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter.safetensors")
    return found


def test_fp16_loss_scale_is_restored(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate makes a gradient scaler on GPUs only, so the test gives it one of the CPU."""

    def with_scaler(*args: Any) -> Any:
        accelerator = run_accelerator.make_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        return accelerator

    scaler = {"scale": 64.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    scaler |= {"growth_interval": 2, "_growth_tracker": 1}
    change_state(run, lambda state: state | {"scaler": scaler})
    monkeypatch.setattr(training_loop, "make_accelerator", with_scaler)
    resume_copy(run)
    kept = json.loads((run / "checkpoint-6" / "state.json").read_text())["scaler"]
    # It grows after steps 4 and 6: one good step was counted before the run stopped.
    assert (kept["scale"], kept["_growth_tracker"]) == (256.0, 0)


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("basis", "in another basis than the run uses now"),
        ("data", "on other data than the run uses now"),
        ("model", "on another base model than the run uses now"),
    ],
)
def test_checkpoint_of_other_data_model_or_basis_is_refused(
    run: Path, origin: str, words: str
) -> None:
    change_state(run, lambda s: s | {"origins": s["origins"] | {origin: "another"}})
    with pytest.raises(FileFormatError, match=f"checkpoint-3 was trained {words}") as caught:
        resume_copy(run)
    assert "from a copy, or start again with --overwrite" in str(caught.value.fix)


def test_checkpoint_of_version_0_1_0_is_resumed(run: Path, tmp_path: Path) -> None:
    """It keeps its progress in trainer_state.json, and is resumed to the same weights."""
    expected = Path(shutil.copytree(run, tmp_path / "expected"))
    resume_copy(expected)
    folder = run / "checkpoint-3"
    state = json.loads((folder / "state.json").read_text())
    progress = state["progress"]
    control = {"should_training_stop": False, "should_evaluate": False, "should_save": True}
    trainer = {
        "global_step": progress["step"],
        "max_steps": progress["max_steps"],
        "best_metric": progress["best_score"],
        "best_global_step": progress["best_step"],
        "stateful_callbacks": {"TrainerControl": {"args": control, "attributes": {}}},
    }
    extras = {
        **state["origins"],
        "order": state["order"],
        "loss": [progress["loss_sums"], progress.get("logged_step", 0)],
        "scaler": None,
        "measured": state["measured"],
    }
    names = ("optimizer_groups", "optimizer_numbers", "scheduler", "random")
    old = {"format": 1, "extras": extras, **{name: state[name] for name in names}}
    (folder / "state.json").write_text(json.dumps(old))
    (folder / "trainer_state.json").write_text(json.dumps(trainer))
    reseal(run)
    resume_copy(run)
    assert record(run)["resumed_from"] == 3
    one, other = adapter(run), adapter(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert record(run)["metrics"] == record(expected)["metrics"]
