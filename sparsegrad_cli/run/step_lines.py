"""Read steps.jsonl: the losses and evaluations of a run, also of one that was killed.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.records.run import Evaluation, MetricsBlock, RunRecord, TrainingLoss

NAME = "steps.jsonl"


def parse_line(line: str) -> Evaluation | TrainingLoss | None:
    """Parse a line; None for the half of one that a kill leaves, and for anything else."""
    try:
        content = plain_json(line)
        if "eval" in content:
            evaluation = Evaluation.model_validate(content["eval"])
            return None if evaluation.score is None else evaluation
        names = TrainingLoss.model_fields
        loss = TrainingLoss.model_validate({k: v for k, v in content.items() if k in names})
        return None if None in (loss.loss, loss.learning_rate) else loss
    except (ValueError, TypeError, AttributeError, ValidationError):
        return None


def with_logged_metrics(run: RunRecord, folder: Path) -> RunRecord:
    """Return the record of a run that did not finish with the metrics that it had logged.

    A run records its metrics at the end. Until then they are in steps.jsonl.
    """
    if run.metrics is not None or run.status == "done":
        return run
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return run
    entries = [parse_line(line) for line in text.splitlines()]
    history = [each for each in entries if isinstance(each, Evaluation)]
    losses = [each for each in entries if isinstance(each, TrainingLoss)]
    if not history and not losses:
        return run
    initial = next((each for each in history if each.step == 0), None)
    return run.changed(metrics=MetricsBlock(initial=initial, history=history, train=losses))
