"""The progress bar shows the last score after a run has ended."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.cli.progress import ProgressObserver


def test_the_progress_bar_shows_the_last_score() -> None:
    observer = ProgressObserver()
    observer.total_steps("train", 2)
    scored: dict[str, Any] = {"metric": "accuracy", "epoch": 1.0, "loss": 0.7}
    for step, score in ((1, 0.25), (2, 0.75)):
        observer.step("train", {"step": step, "loss": 0.5})
        observer.evaluated({**scored, "step": step, "score": score})
    (bar,) = observer._progress.tasks
    assert bar.completed == 2
    assert "score 75.0" in bar.fields["state"] and "25.0" not in bar.fields["state"]
