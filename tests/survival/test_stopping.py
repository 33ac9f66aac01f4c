"""After SIGTERM or Ctrl-C outside a training step, a run stops within a batch and can resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.kill_process import REPO
from support.survival_runs import Workspace, flat, record, results, weights

# 24 validation rows in batches of 4: six batches per evaluation.
BATCHES = ("train.per_device_eval_batch_size=4", "calibration.steps=40", "task.max_length=16")
METHOD = "core static"
# point -> (call that is signalled, calls until the run stops, where it reports that it stopped)
STOP_POINTS = {
    "interrupted-loading": (1, 1, "stopped by the user"),
    "interrupted-warming": (1, 1, "stopped in the calibrate phase"),
    "interrupted-calibrating": (
        5,
        6,
        "stopped in the calibrate phase",
    ),  # each batch is split into two parts
    "interrupted-decomposing": (2, 2, "stopped in the calibrate phase"),
    "interrupted-probing": (1, 1, "stopped in the evaluation after step 2 of 24; checkpoint-2"),
}


def stopped(
    workspace: Workspace, run: Path, point: str, count: int, *flags: str
) -> tuple[int, str]:
    """Stop a run at a point; return the number of calls of the patched function, and stderr."""
    ended = workspace.train(METHOD, run, *BATCHES, *flags, point=point, count=count)
    assert ended.code == 130, ended.err
    assert record(run)["status"] == "interrupted"
    return ended.err.count("called "), flat(ended)


@pytest.mark.parametrize("point", STOP_POINTS)
def test_stopped_run_computes_no_further_batch(workspace: Workspace, point: str) -> None:
    count, calls, words = STOP_POINTS[point]
    found, said = stopped(workspace, workspace.new_run(), point, count)
    assert found == calls
    assert words in said and "--resume" in said


EVALUATED = (*BATCHES, "train.max_steps=6", "train.early_stopping_patience=null")


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Path:
    run = workspace.new_run()
    assert workspace.train(METHOD, run, *EVALUATED).code == 0
    return run


@pytest.mark.parametrize("count", [3, 9, 22])  # before the first step, at step 2, at the last one
def test_interrupted_evaluation_is_repeated_first_on_resume(
    workspace: Workspace, whole: Path, count: int
) -> None:
    run, settings = workspace.new_run(), EVALUATED
    ended = workspace.train(METHOD, run, *settings, point="interrupted-evaluating", count=count)
    assert ended.code == 130, ended.err
    assert ended.err.count("called ") == count
    # Stopped once more in the same evaluation.
    if count > 6:
        assert "is saved" in flat(ended) and "repeats that evaluation first" in flat(ended)
        again = workspace.train(
            METHOD, run, *settings, "--resume", point="interrupted-evaluating", count=2
        )
        assert again.code == 130 and again.err.count("called ") == 2
    resumed = workspace.train(METHOD, run, *settings, "--resume")
    assert resumed.code == 0, resumed.err
    assert weights(run) == weights(whole)
    assert results(record(run)) == results(record(whole))


AT_THE_END = ("train.max_steps=6", "train.early_stopping_patience=null")
# The last weights, without a checkpoint of their own, are measured on a test set.
TESTED = (
    *AT_THE_END,
    *("task.holdout=12", "train.load_best_model_at_end=false", "train.save_strategy=no"),
)


@pytest.mark.parametrize(
    ("point", "count", "settings", "words"),
    [
        # The evaluations before training and after steps 2, 4 and 6; then that of the test set.
        ("interrupted-judged", 4, AT_THE_END, "stopped after step 6 of 6; checkpoint-6 is saved"),
        ("interrupted-recording", 1, AT_THE_END, "stopped in the evaluate phase (best model)"),
        ("interrupted-judged", 4, TESTED, "stopped after step 6 of 6; checkpoint-6 is saved"),
        ("interrupted-judged", 5, TESTED, "stopped in the evaluate phase (test)"),
    ],
)
def test_request_after_the_last_step_stops_the_run(
    workspace: Workspace, point: str, count: int, settings: tuple[str, ...], words: str
) -> None:
    whole, run = workspace.new_run(), workspace.new_run()
    assert workspace.train("lora", whole, *settings).code == 0
    ended = workspace.train("lora", run, *settings, point=point, count=count)
    assert ended.code == 130, ended.err
    assert record(run)["status"] == "interrupted" and not (run / "adapter").exists()
    assert words in flat(ended) and "--resume" in flat(ended)
    resumed = workspace.train("lora", run, *settings, "--resume")
    assert resumed.code == 0, resumed.err
    assert record(run)["resumed_from"] == 6  # no step is taken again
    assert weights(run) == weights(whole)
    assert results(record(run)) == results(record(whole))


def test_request_while_the_adapter_is_written_says_that_the_run_is_finished(
    workspace: Workspace,
) -> None:
    run = workspace.new_run()
    ended = workspace.train("lora", run, *AT_THE_END, point="interrupted-saving")
    assert ended.code == 0 and record(run)["status"] == "done"
    assert (
        "asked to stop: training is over, and the run ends after writing the adapter and the report"
        in flat(ended)
    )


def test_delay_is_explained_by_the_phase_that_is_on() -> None:
    from sparsegrad_cli.interruption import _delay, _State

    state = _State(tell=lambda text: None, again="")
    state.phase = state.activity = "the evaluate phase (test)"
    assert _delay(state) == "the evaluate phase (test) is not over yet"
    state.activity = "an evaluation batch"
    assert _delay(state) == "the evaluate phase (test) cannot leave an evaluation batch halfway"


def test_calibrate_stops_in_calibration_and_energy_measurement(workspace: Workspace) -> None:
    for point, count, calls in (
        ("interrupted-calibrating", 5, 6),
        ("interrupted-measuring", 2, 2),
    ):
        run = workspace.new_run()
        ended = workspace.fork_server.run(
            "calibrate",
            *workspace.settings(METHOD, *BATCHES),
            "-o",
            str(run),
            point=point,
            count=count,
        )
        assert ended.code == 130 and record(run)["status"] == "interrupted"
        assert ended.err.count("called ") == calls
        assert "--overwrite" in flat(ended)


def test_second_signal_does_not_wait_for_the_batch(workspace: Workspace) -> None:
    run = workspace.new_run()
    found, said = stopped(workspace, run, "interrupted-calibrating-twice", 5)
    assert found == 5
    assert "stopped by the user" in said
    assert workspace.train(METHOD, run, *BATCHES, "--resume").code == 0


HELD_UP = """
import sys, time
from sparsegrad_cli import interruption
from sparsegrad_cli.calibration import calibrate as calibration
from sparsegrad_cli.cli.app import main

interruption.PATIENCE_S = 0.3
real = calibration.gradient_step
def slow(*args, **kwargs):
    print("batch", file=sys.stderr, flush=True)
    found = real(*args, **kwargs)
    time.sleep(1.0)
    return found
calibration.gradient_step = slow
main()
"""


def test_slow_stop_reports_the_phase_and_the_request(
    workspace: Workspace,
) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HELD_UP,
            "train",
            *workspace.settings(METHOD, *BATCHES),
            "-o",
            str(workspace.new_run()),
        ],
        env=os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line == "batch\n":
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said.append(process.stderr.read())
    assert process.wait() == 130
    text = " ".join("".join(said).split())
    assert text.count("batch ") <= 2 + text.count("batch 1")
    assert "asked to stop: the calibrate phase" in text
    assert "cannot leave batch 1 halfway" in text


def test_simultaneous_sigterm_and_sigint_are_one_request() -> None:
    """A scheduler and a comparison may both signal a run; a user who insists repeats a signal."""
    from sparsegrad_cli.interruption import _Requests

    requests = _Requests()
    assert not requests.insists(signal.SIGTERM)
    assert not requests.insists(signal.SIGINT)
    assert requests.insists(signal.SIGTERM)
