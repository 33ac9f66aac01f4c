"""Tell what a run, a comparison or an export is for, before its model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import expanded, is_file
from sparsegrad_cli.recipe.tasks import CHAT_TASKS
from sparsegrad_cli.records.metric_direction import scale_of
from sparsegrad_cli.records.store import load_run, load_run_or_study
from sparsegrad_cli.records.study import StudyRecord


class Source(NamedTuple):
    """What predicts.

    Attributes:
        name: folder of a run or an export, or a hub id.
        note: which run of a comparison it is; empty if the user named it.
        answers: whether it is a chat model, which answers instead of labelling.
    """

    name: str
    note: str
    answers: bool


def find_source(given: str) -> Source:
    """Return what the user has named: of a comparison its best run, of an adapter its run.

    Raises:
        UsageError: the comparison has several tasks, or no finished run.
        FileFormatError: a record is damaged.
    """
    folder = expanded(given)
    if folder.name == "adapter" and is_file(folder.parent / "run.json"):
        folder = folder.parent
    if is_file(folder / "run.json") or is_file(folder / "compare.json"):
        found, note = load_run_or_study(folder), ""
        if isinstance(found, StudyRecord):
            folder, note = _best_run(folder, found)
            found = load_run(folder)
        return Source(str(folder), note, bool(found.task and found.task.name in CHAT_TASKS))
    return Source(given, "", _generates(folder))


def _best_run(folder: Path, study: StudyRecord) -> tuple[Path, str]:
    """Return the finished run of a comparison with the best score, and a note that names it."""
    tasks = {cell.task for cell in study.cells}
    if len(tasks) > 1:
        raise UsageError(
            f"the comparison in {folder} has several tasks: {', '.join(sorted(tasks))}",
            where="command line",
            fix="name one of its runs",
        )
    scored = []
    for cell in study.cells:
        metrics = cell.run.metrics if cell.run and cell.run_dir and cell.status == "done" else None
        if metrics is not None and metrics.best is not None and metrics.best.score is not None:
            scored.append((metrics.best.score, cell, metrics.best.metric))
    if not scored:
        raise UsageError(f"the comparison in {folder} has no finished run", where="command line")
    metric = scored[0][2]
    sign = -1 if scale_of(metric).lower_is_better else 1
    score, cell, _ = max(scored, key=lambda found: sign * found[0])
    note = f"the best of {len(scored)} runs: {cell.method}, seed {cell.seed} ({metric} {score:.4g})"
    return folder / str(cell.run_dir), note


def _generates(folder: Path) -> bool:
    """Return whether the files of an export, an adapter or a model are those of a chat model."""
    adapter = _json(folder / "adapter.json").get("model")
    if isinstance(adapter, dict):
        return adapter.get("auto_class") == "AutoModelForCausalLM"
    task = _json(folder / "adapter_config.json").get("task_type")
    if task is not None:
        return bool(task == "CAUSAL_LM")
    kinds = _json(folder / "config.json").get("architectures")
    return isinstance(kinds, list) and any(str(kind).endswith("ForCausalLM") for kind in kinds)


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is none. Damaged files are reported when loaded."""
    try:
        found = plain_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
