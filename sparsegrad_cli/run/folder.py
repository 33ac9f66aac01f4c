"""The folder of a run: choose it, lock it, and prepare it for a new or a resumed run.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsegrad_cli.errors import DiskError, InterruptedRunError, SparsegradError, UsageError
from sparsegrad_cli.io.atomic import torn_writes, write_text_atomic
from sparsegrad_cli.io.locks import NAME as LOCK
from sparsegrad_cli.io.locks import FolderLock, owner_of
from sparsegrad_cli.io.paths import (
    exists,
    from_here,
    is_file,
    is_folder,
    make_folder,
    remove_folder,
)
from sparsegrad_cli.recipe import trackers
from sparsegrad_cli.recipe.load_recipe import to_yaml
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.run import ErrorBlock, Extension, RunRecord
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.run.resume import check_resumable

ADAPTER = Path("adapter", "adapter.safetensors")
PEFT_ADAPTER = Path("adapter", "adapter_model.safetensors")
# Everything that a run and the commands on it write into the folder.
_FOLDERS = (
    "checkpoint-*",
    "adapter",
    "model",
    "export-*",
    ".export-*.sparsegrad-export.*",
    "answers",
    *trackers.FOLDERS,
)
_FILES = (
    "run.json",
    "recipe.yaml",
    "steps.jsonl",
    "report.html",
    "report.md",
    "basis.safetensors",
    trackers.IDS,
)


def adapter_file(run: Path) -> Path | None:
    """Return the adapter file in a run's folder; None if training has not ended."""
    for name in (PEFT_ADAPTER, ADAPTER):
        if is_file(run / name):
            return run / name
    return None


def choose_folder(recipe: Recipe, command: str) -> Path:
    """Return ``output_dir``, or create the first free ``runs/<task>-<method>-<n>``."""
    if recipe.output_dir is not None:
        return from_here(recipe.output_dir)
    task = recipe.task.name.replace("builtin:", "").replace("/", "-")
    stem = f"{task}-{recipe.method.name}" if command == "train" else f"{task}-basis"
    number = 1
    while True:
        path = Path("runs") / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)  # Created at once: another run may choose, too.
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(path, error) from error
        else:
            return path


@contextmanager
def lock_folder(path: Path, tell: Callable[[str], None] = lambda note: None) -> Iterator[None]:
    """Create the folder, and lock it for this process inside the context.

    Args:
        path: the folder.
        tell: called with a note if the file system has no locks.

    Raises:
        UsageError: the path is a file.
        BusyError: another run uses the folder.
        DiskError: the folder cannot be written.
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
            with suppress(OSError):  # A folder that is not empty is kept.
                path.rmdir()


def prepare_folder(
    path: Path, recipe: Recipe, *, resume: bool, overwrite: bool
) -> Extension | None:
    """Prepare a locked folder for a run, or refuse it.

    Without ``resume`` or ``overwrite``, a folder that is not empty is refused unless it holds only
    a run that ended before its first step.

    Args:
        path: the folder.
        recipe: the recipe of the run.
        resume: continue the run of the same recipe in the folder.
        overwrite: remove the files of an earlier run; other files stay.

    Returns:
        The run's settings before it was extended, if it is resumed to train longer
        (:func:`check_resumable`).

    Raises:
        UsageError: the folder is not empty, has no run to resume, or has a run of another recipe.
        DiskError: the folder cannot be written.
    """
    if resume:
        extended = check_resumable(path, recipe)
        _remove_torn_writes(path)
        if not exists(path / "recipe.yaml"):  # The digest in run.json says that this is its recipe.
            write_text_atomic(path / "recipe.yaml", to_yaml(recipe))
        return extended
    occupied = path.is_dir() and any(found.name != LOCK for found in path.iterdir())
    if occupied and not overwrite and not _never_trained(path):
        raise UsageError(
            f"the folder {path} is not empty",
            where="output_dir",
            fix="--resume continues the run in it, --overwrite replaces it, "
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
    """Return whether a folder holds only a run that ended before its first step, and no basis."""
    names = {found.name for found in path.iterdir()} - {LOCK}
    if not names <= {"run.json", "recipe.yaml", "steps.jsonl", "report.html", "report.md"}:
        return False
    steps = path / "steps.jsonl"
    if exists(steps) and not (is_file(steps) and steps.stat().st_size == 0):
        return False
    try:
        status = load_run(path).status
    except SparsegradError:
        return False
    return status in ("failed", "out_of_memory", "interrupted")


def _remove_torn_writes(path: Path) -> None:
    """Remove the temporary files that killed writes left."""
    for name in _FILES:
        for left in (*torn_writes(path / name), *path.glob(f"{name}.partial")):
            with suppress(OSError):
                left.unlink()


def _clear(path: Path) -> None:
    """Remove the files and folders of a run. For a link, only the link is removed."""
    for pattern in _FOLDERS:
        for folder in path.glob(pattern):
            remove_folder(folder)
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    _remove_torn_writes(path)


def _unwritable(path: Path, error: OSError | ValueError) -> DiskError:
    return DiskError(
        f"the folder {path} cannot be written: {getattr(error, 'strerror', None) or error}",
        where="output_dir",
        fix="check its permissions, or name another output_dir",
    )


def with_current_status(record: RunRecord, folder: Path) -> RunRecord:
    """Return a run's record, with the status ``interrupted`` if the run was killed."""
    if record.status != "running" or owner_of(folder) is not None:
        return record
    again = f"sparsegrad train {folder} --resume"
    error = ErrorBlock(
        title=InterruptedRunError.title,
        what="the process was killed",
        where=None,
        fix=again if record.command == "train" else "run again with --overwrite",
    )
    return record.changed(status=InterruptedRunError.status, error=error)
