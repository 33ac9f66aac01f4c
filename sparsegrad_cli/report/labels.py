"""The words of the report: statuses, phases, categories, metrics, columns of the energy table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.report.access import block, number, text

STATUSES = {
    "done": "done",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "interrupted": "interrupted",
    "pruned": "pruned",
    "running": "still running",
    "pending": "not run yet",
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
    "support": "support that trains",
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


def status_of(data: Any) -> str:
    """The key of a status; ``unknown`` where a record has none."""
    return text(data, "status") or "unknown"


def status_words(status: str) -> str:
    """A status in words; one this version does not know is shown as it stands."""
    return STATUSES.get(status, status.replace("_", " "))


def method_words(run: Any) -> str | None:
    """``sparsegrad (rotated form, dynamic support, density 0.01, scope head)``."""
    method = block(run, "method")
    name = text(method, "name")
    if name is None:
        return None
    parts = [
        f"{text(method, key)} {word}".strip()
        for key, word in (("form", "form"), ("support", "support"))
        if text(method, key)
    ]
    entries = number(method, "settings", "entries")
    parts += [f"{entries:,.0f} entries"] if entries is not None else []
    parts += [f"{key} {text(method, key)}" for key in ("density", "scope") if text(method, key)]
    return f"{name} ({', '.join(parts)})" if parts else name


def error_lines(error: Any) -> list[tuple[str, str]]:
    """(label, text) of what is known of an error."""
    if not isinstance(error, Mapping):
        plain = text(error)
        return [("what", plain)] if plain else []
    found = [(key, text(error, key)) for key in ("what", "where", "fix")]
    return [(key, value) for key, value in found if value]


def reason(error: Any) -> str | None:
    """What went wrong, on one line."""
    lines = error_lines(error)
    return lines[0][1] if lines else None
