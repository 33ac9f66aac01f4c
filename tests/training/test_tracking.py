"""Trackers log through accelerate to transformers' integrations; a fake one records the events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.small_runs import base_folder, data_folder, train
from support.tiny_models import one_thread
from transformers import TrainerCallback

from sparsegrad_cli.training import tracking


class Recorder(TrainerCallback):
    """Record the events of a run."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **content: Any) -> None:
        assert args.run_name == "run" and content["model"].config.model_type == "bert"
        self.events.append(("begin", state.global_step, {}))

    def on_log(self, args: Any, state: Any, control: Any, **content: Any) -> None:
        self.events.append(("log", state.global_step, dict(content["logs"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **content: Any) -> None:
        self.events.append(("end", state.global_step, {}))


def test_losses_and_evaluations_reach_a_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(tracking, "named", lambda report_to: ("tensorboard",))
    monkeypatch.setattr(
        tracking, "get_reporting_integration_callbacks", lambda names: [lambda: recorder]
    )
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    more = ("method=lora", "train.max_steps=2", "train.logging_steps=1", "train.max_grad_norm=1")
    with one_thread():
        train(tmp_path / "run", base, data, *more)
    kinds = [(name, step) for name, step, _ in recorder.events]
    assert kinds == [("begin", 0), ("log", 0), ("log", 1), ("log", 2), ("log", 2), ("end", 2)]
    assert set(recorder.events[2][2]) == {"loss", "learning_rate", "epoch", "grad_norm"}
    assert {"eval_score", "eval_loss", "epoch"} <= set(recorder.events[1][2])
