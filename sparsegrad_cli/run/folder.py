"""The run directory: who may write into it, and its run.json while the run lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import (
    DiskError,
    FileFormatError,
    InterruptedRunError,
    RecipeError,
    SparsegradError,
    UsageError,
)
from sparsegrad_cli.io.locks import NAME as LOCK
from sparsegrad_cli.io.locks import FolderLock, owner_of
from sparsegrad_cli.io.paths import (
    exists,
    from_here,
    is_file,
    is_folder,
    make_folder,
    refuse_link,
    remove_folder,
)
from sparsegrad_cli.recipe import trackers
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe, to_yaml
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.store import (
    load_record,
    torn_writes,
    write_text_atomic,
)
from sparsegrad_cli.run.extension import extension

ADAPTER = Path("adapter", "adapter.safetensors")
PEFT_ADAPTER = Path("adapter", "adapter_model.safetensors")
_OURS = ("checkpoint-*", "adapter", "model", "export-*", "answers", *trackers.FOLDERS)
_OUR_FILES = (
    "run.json",
    "recipe.yaml",
    "steps.jsonl",
    "report.html",
    "report.md",
    "basis.safetensors",
)


def adapter_file(run: Path) -> Path | None:
    """The file in a run's folder with what was trained, or None: training has not ended."""
    for name in (PEFT_ADAPTER, ADAPTER):
        if is_file(run / name):
            return run / name
    return None


def choose_run_dir(recipe: Recipe, command: str) -> Path:
    """``output_dir``, or the first free ``runs/<task>-<method>-<n>``."""
    if recipe.output_dir is not None:
        return from_here(recipe.output_dir)
    task = recipe.task.name.replace("builtin:", "").replace("/", "-")
    stem = f"{task}-{recipe.method.name}" if command == "train" else f"{task}-basis"
    number = 1
    while True:
        path = Path("runs") / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)  # at once: another run may be looking for a name, too
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(path, error) from error
        else:
            return path


@contextmanager
def held_run_dir(path: Path, tell: Callable[[str], None] = lambda note: None) -> Iterator[None]:
    """Inside, the directory is there, and this process alone may write into it.

    Raises:
        UsageError: it is a file.
        BusyError: another run is at work in it.
        DiskError: it cannot be written.
    """
    if exists(path) and not is_folder(path):
        raise UsageError(f"{path} is a file, not a folder", where="output_dir")
    made = not exists(path)
    try:
        make_folder(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with FolderLock(path, tell=tell):
            yield
    finally:
        if made:
            with suppress(OSError):  # nothing came of it, or it is in use by now
                path.rmdir()


def open_run_dir(
    path: Path, recipe: Recipe, *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Make a held directory ready, or refuse.

    Returns:
        What the run was before, where it is resumed to train longer (:func:`extension`).

    A directory with something in it is refused, unless ``resume`` (it holds a run of the same
    recipe), ``overwrite`` (what a run leaves is removed; foreign files stay), or nothing is in it
    but a run that ended before it trained.

    Raises:
        UsageError: not empty, nothing to resume, or a run of another recipe.
        DiskError: it cannot be written.
    """
    if resume:
        extended = _check_resumable(path, recipe)
        _remove_left(path)
        return extended
    occupied = path.is_dir() and any(found.name != LOCK for found in path.iterdir())
    if occupied and not overwrite and not _never_trained(path):
        raise UsageError(
            f"the folder {path} is not empty",
            where="output_dir",
            fix="--resume goes on with the run in it, --overwrite replaces it, "
            "or name another output_dir",
        )
    try:
        if occupied:
            _clear(path)
        make_folder(path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    write_text_atomic(path / "recipe.yaml", to_yaml(recipe))
    return None


def _never_trained(path: Path) -> bool:
    """Whether a held directory holds only a run that ended before its first step, and no basis."""
    names = {found.name for found in path.iterdir()} - {LOCK}
    if not names <= {"run.json", "recipe.yaml", "steps.jsonl", "report.html", "report.md"}:
        return False
    steps = path / "steps.jsonl"
    if exists(steps) and not (is_file(steps) and steps.stat().st_size == 0):
        return False
    try:
        status = load_record(path).get("status")
    except SparsegradError:
        return False
    return status in ("failed", "out_of_memory", "interrupted")


def _remove_left(path: Path) -> None:
    """What a kill in the middle of writing has left of our files, under their temporary names."""
    for name in _OUR_FILES:
        for left in (*torn_writes(path / name), *path.glob(f"{name}.partial")):
            with suppress(OSError):
                left.unlink()


def _unwritable(path: Path, error: OSError | ValueError) -> DiskError:
    return DiskError(
        f"the folder {path} cannot be written: {getattr(error, 'strerror', None) or error}",
        where="output_dir",
        fix="check its permissions, or name another output_dir",
    )


def _clear(path: Path) -> None:
    """Remove what a run leaves, links to elsewhere without what they name."""
    for pattern in _OURS:
        for folder in path.glob(pattern):
            remove_folder(folder)
    for name in _OUR_FILES:
        (path / name).unlink(missing_ok=True)
    _remove_left(path)


def _check_resumable(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    for name in ("adapter", "steps.jsonl"):  # written in place
        refuse_link(path / name, path)
    steps = path / "steps.jsonl"
    if exists(steps) and not is_file(steps):
        raise UsageError(f"{steps} is no file", where=str(steps), fix="take it away")
    recorded = _recipe_of(path)
    return None if recorded == digest(recipe) else extension(path, recorded, recipe)


def _recipe_of(path: Path) -> str | None:
    """Digest of the recipe that a run was started with.

    A run that was killed before its first record has its recipe already.
    """
    recipe = path / "recipe.yaml"
    if (path / "run.json").is_file():
        try:
            found: str | None = load_record(path).get("recipe_digest")
        except FileFormatError as error:
            raise FileFormatError(
                error.what,
                where=error.where,
                fix=f"take it away, and --resume goes by {recipe.name}",
            ) from error
        return found
    if not recipe.is_file():
        raise UsageError(f"{path} holds no run to resume", where="output_dir")
    try:
        return digest(load_recipe(recipe, data=False).recipe)
    except RecipeError as error:
        raise FileFormatError("recipe.yaml is damaged", where=str(recipe)) from error


def as_it_is(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's record; of one that was killed, and so could not say it, with that status."""
    if "cells" in record or record.get("status") != "running" or owner_of(folder) is not None:
        return record
    trains = record.get("command") == "train"
    error = {
        "title": InterruptedRunError.title,
        "what": "the process was killed",
        "where": None,
        "fix": f"sparsegrad train {folder} --resume" if trains else "again, with --overwrite",
    }
    return {**record, "status": InterruptedRunError.status, "error": error}
