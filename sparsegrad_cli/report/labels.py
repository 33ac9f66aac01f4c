"""The words that reports use for statuses, memory categories and phases."""

from __future__ import annotations

from sparsegrad_cli.report.access import text

STATUSES = {
    "done": "done",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "interrupted": "interrupted",
    "pruned": "pruned",
    "running": "still running",
    "pending": "not run yet",
    "unknown": "unknown",
}
CATEGORIES = {
    "weights": "weights",
    "bases": "bases",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved_activations": "saved activations",
    "other": "other",
}
PHASES = ("load", "calibrate", "energy", "forward", "backward", "optimizer", "evaluate")
TRAIN_STEP = ("forward", "backward", "optimizer")
TIMES = {
    "load_s": "load",
    "calibrate_s": "calibrate",
    "diagnostics_s": "diagnose the basis",
    "train_s": "train",
    "evaluate_s": "evaluate",
}
SUPPORT_ENERGY = {
    "support": "trained support",
    "full_basis": "best in full-rank basis",
    "original": "best in original basis",
}
ENERGY = {
    "original": "original",
    "transposed": "published code",
    "kind_basis": "per kind",
    "layer_basis": "per layer",
    "whole_core": "whole core",
}


def status_words(status: str) -> str:
    """Return a status in words; an unknown one as it stands."""
    return STATUSES.get(status, status.replace("_", " "))


def status_of(data: object) -> str:
    """Return the status of a record that is still a mapping; ``unknown`` where it has none."""
    return text(data, "status") or "unknown"
