from __future__ import annotations

import time

import pytest

from sparsegrad_cli.training.step_timer import PhaseClock, StepTimer


def filled(*durations: float) -> StepTimer:
    timer = StepTimer()
    timer.durations.extend(durations)
    return timer


def test_statistics_of_known_durations() -> None:
    timer = filled(1.0, 2.0, 3.0, 4.0, 10.0)
    assert timer.median() == 3.0
    assert timer.iqr() == pytest.approx(2.0)  # numpy: 4 - 2
    assert timer.steps_per_s() == pytest.approx(5 / 20)
    assert timer.recent_steps_per_s(2) == pytest.approx(2 / 14)
    assert timer.summary() == {
        "steps_per_s": timer.steps_per_s(),
        "step_median_s": 3.0,
        "step_iqr_s": timer.iqr(),
    }


def test_before_the_first_steps_there_are_zeros_not_errors() -> None:
    assert set(StepTimer().summary().values()) == {0.0}
    assert StepTimer().recent_steps_per_s() == 0.0
    one = filled(2.0)
    assert (one.median(), one.iqr(), one.steps_per_s()) == (2.0, 0.0, 0.5)


def test_start_and_stop_record_one_step() -> None:
    timer = StepTimer("cuda")  # without a GPU nothing is synchronized
    timer.start()
    timer.start()  # the first was never finished
    duration = timer.stop()
    assert timer.durations == [duration] and duration >= 0
    with pytest.raises(RuntimeError):
        timer.stop()


def test_phases_add_up_without_counting_twice() -> None:
    clock = PhaseClock()
    started = time.perf_counter()
    with clock.phase("train"):
        with clock.phase("evaluate"):
            time.sleep(0.01)
        with clock.phase("evaluate"):
            pass
    with clock.phase("train"):
        pass
    elapsed = time.perf_counter() - started
    assert list(clock.to_json()) == ["evaluate_s", "train_s"]
    assert clock.seconds["evaluate"] >= 0.01
    assert 0 <= sum(clock.seconds.values()) <= elapsed
    assert clock.seconds["train"] <= elapsed - clock.seconds["evaluate"]


def test_a_phase_that_fails_is_counted() -> None:
    clock = PhaseClock()
    with pytest.raises(ValueError), clock.phase("load"):
        raise ValueError
    assert set(clock.seconds) == {"load"}
    with clock.phase("train"):
        pass
    assert set(clock.to_json()) == {"load_s", "train_s"}
