"""The run directory: who may write into it, and its run.json while the run lives."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from sparsegrad_cli import ranks
from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.paths import refuse_link, remove_folder
from sparsegrad_cli.recipe.loading import digest, to_yaml
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.report.records import load_record, write_json_atomic

SCHEMA = 1
_OURS = ("checkpoint-*", "adapter", "model", "export-*", "answers")
_OUR_FILES = (
    "run.json",
    "recipe.yaml",
    "steps.jsonl",
    "report.html",
    "report.md",
    "basis.safetensors",
)


def choose_run_dir(recipe: Recipe, command: str) -> Path:
    """``output_dir``, or the first free ``runs/<task>-<method>-<n>``."""
    if recipe.output_dir is not None:
        return Path(recipe.output_dir).expanduser()
    task = recipe.task.name.replace("builtin:", "").replace("/", "-")
    stem = f"{task}-{recipe.method.name}" if command == "train" else f"{task}-basis"
    number = 1
    while (path := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return path


def open_run_dir(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the directory ready, or refuse.

    A directory with something in it is refused, unless ``resume`` (it holds a run of the same
    recipe) or ``overwrite`` (what a run leaves is removed; foreign files stay).

    Raises:
        UsageError: not empty, nothing to resume, or a run of another recipe.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder", where="output_dir")
    occupied = path.is_dir() and any(path.iterdir())
    if resume:
        _check_resumable(path, recipe)
        return
    if occupied and not overwrite:
        raise UsageError(
            f"the folder {path} is not empty",
            where="output_dir",
            fix="--resume goes on with the run in it, --overwrite replaces it, "
            "or name another output_dir",
        )
    if occupied:
        _clear(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written: {error}", where="output_dir") from error


def _clear(path: Path) -> None:
    """Remove what a run leaves, links to elsewhere without what they name."""
    try:
        for pattern in _OURS:
            for folder in path.glob(pattern):
                remove_folder(folder)
        for name in _OUR_FILES:
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be cleared: {error}", where="output_dir") from error


def _check_resumable(path: Path, recipe: Recipe) -> None:
    for name in ("adapter", "steps.jsonl"):  # written in place
        refuse_link(path / name, path)
    if not (path / "run.json").is_file():
        raise UsageError(f"{path} holds no run to resume", where="output_dir")
    record = load_record(path)
    if record.get("recipe_digest") != digest(recipe):
        raise UsageError(
            f"the run in {path} was started with another recipe",
            where="output_dir",
            fix=f"sparsegrad train {path / 'recipe.yaml'} --resume, or another output_dir",
        )


class RunRecord:
    """run.json of a living run: written whole at every milestone, so that it is never missing.

    Of several processes the first alone writes.

    Args:
        path: the run directory.
        data: the first content; ``status`` is set to ``running``.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "error": None,
            "started": now(),
            "finished": None,
            **data,
        }

    def save(self, **changes: Any) -> None:
        """Merge changes and write."""
        self.data.update(changes)
        if ranks.is_first():
            write_json_atomic(self.path / "run.json", self.data)

    def finish(self, error: SparsegradError | None = None) -> None:
        """Set the final status and write."""
        problem = None
        if error is not None:
            problem = {
                "title": error.title,
                "what": error.what,
                "where": error.where,
                "fix": error.fix,
            }
        self.save(status=error.status if error else "done", error=problem, finished=now())


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
