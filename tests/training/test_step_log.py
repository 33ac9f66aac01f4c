"""The timer of steps. Tests of resumed runs check the content of steps.jsonl."""

from __future__ import annotations

import pytest
import torch

from sparsegrad_cli.training.step_log import StepTimer


def filled(*durations: float) -> StepTimer:
    timer = StepTimer()
    timer.durations.extend(durations)
    return timer


def test_timer_statistics_of_known_durations() -> None:
    timer = filled(1.0, 2.0, 3.0, 4.0, 10.0)
    assert timer.recent_steps_per_s(2) == pytest.approx(2 / 14)
    # The quartiles as numpy interpolates them: 2 and 4.
    assert timer.summary() == {"steps_per_s": 5 / 20, "step_median_s": 3.0, "step_iqr_s": 2.0}


def test_timer_statistics_are_zero_without_steps() -> None:
    assert set(StepTimer().summary().values()) == {0.0}
    assert StepTimer().recent_steps_per_s() == 0.0
    assert filled(2.0).summary() == {"steps_per_s": 0.5, "step_median_s": 2.0, "step_iqr_s": 0.0}


def test_timer_drops_a_step_that_was_not_stopped() -> None:
    timer = StepTimer()
    timer.start()
    timer.start()
    duration = timer.stop()
    assert timer.durations == [duration] and duration >= 0
    with pytest.raises(RuntimeError):
        timer.stop()


def test_timer_waits_until_the_gpu_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    timer = StepTimer("cuda:0")
    timer.start()
    timer.stop()
    assert synchronized == ["cuda:0", "cuda:0"]
