"""A run in its directory: held by one, recorded however it ends, and reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsegrad_cli import distributed
from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import DiskError, InterruptedRunError, SparsegradError, UsageError
from sparsegrad_cli.interruption import handle_signals
from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, digest, to_yaml
from sparsegrad_cli.records.store import load_run, write_text_atomic
from sparsegrad_cli.report.access import mappings
from sparsegrad_cli.run import preflight
from sparsegrad_cli.run.folder import (
    RunRecord,
    adapter_file,
    choose_run_dir,
    held_run_dir,
    open_run_dir,
)
from sparsegrad_cli.run.launcher import check_sharding

_REPORT = ("report.md", "report.html")
_AGAIN = {
    "train": "--resume continues from the last checkpoint, if there is one",
    "calibrate": "run it again with --overwrite",
}


def run_recorded(
    loaded: LoadedRecipe,
    command: str,
    work: Callable[[RunRecord, Observer], None],
    observer: Observer | None,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Do some work in the run directory of a recipe. A run that is done is left as it is.

    Args:
        loaded: the recipe.
        command: ``train`` or ``calibrate``.
        work: what to do; it fills the record.
        observer: told of phases; closed in the end.
        resume, overwrite: as in :func:`open_run_dir`.

    Returns:
        The content of run.json.

    Raises:
        SparsegradError: of the kind that says what happened; so does run.json.
    """
    observer = observer or Observer()
    recipe = loaded.recipe
    _check_shares(loaded, command)
    check_sharding(loaded, command, resume=resume)
    if not resume:
        _check_outside(loaded, command)
    distributed.init(use_cpu=recipe.train.use_cpu)
    with ExitStack() as held:
        held.callback(observer.close)
        held.enter_context(handle_signals(observer.note, _AGAIN[command]))

        def opened() -> tuple[Path, dict[str, Any] | None]:
            path = choose_run_dir(recipe, command)
            held.enter_context(held_run_dir(path, observer.note))
            return path, open_run_dir(path, recipe, resume=resume, overwrite=overwrite)

        # Of processes that train together, the first holds the folder for all.
        run_dir, extended = distributed.from_rank_zero(opened)
        before: dict[str, Any] = {}
        done = False
        if resume:
            before, done = distributed.from_rank_zero(lambda: _recorded_before(run_dir, command))
        if extended is not None:
            before["extended"], done = [*mappings(before, "extended"), extended], False
        if resume and not done:
            _check_outside(loaded, command)
        if done:
            observer.note("the run is done: nothing is trained again")
            record = RunRecord(run_dir, {**before, "output_dir": str(run_dir)})
        else:
            record = _recorded(loaded, command, run_dir, work, observer, before)
        reported = done and all(is_file(run_dir / name) for name in _REPORT)
        if distributed.is_rank_zero() and not reported:
            with mapped_errors(again=f"sparsegrad report {run_dir}"):
                _write_report(record, observer)
    return record.data


def _recorded_before(run_dir: Path, command: str) -> tuple[dict[str, Any], bool]:
    """What a run that is resumed has recorded so far, and whether it is done.

    One whose adapter has been taken away is not: that is made again.
    """
    found = load_run(run_dir).to_json() if is_file(run_dir / "run.json") else {}
    if found.get("command") != command:  # of a calibration the basis is of use, the record is not
        return {}, False
    return found, found.get("status") == "done" and adapter_file(run_dir) is not None


def _check_outside(loaded: LoadedRecipe, command: str) -> None:
    """Find what packages and data will refuse before anything heavy is imported."""
    try:
        preflight.check(loaded, trains=command == "train")
    except SparsegradError as error:
        distributed.raise_on_rank_zero(error)  # every process has found it


def _check_shares(loaded: LoadedRecipe, command: str) -> None:
    """Calibration steps are shared out: every process needs one to find anything.

    Raises:
        UsageError: there are fewer steps than processes.
    """
    recipe = loaded.recipe
    wanted = recipe.method.calibrates and recipe.calibration.basis is None
    if (wanted or command == "calibrate") and recipe.calibration.steps < distributed.world_size():
        distributed.raise_on_rank_zero(
            UsageError(
                f"{distributed.world_size()} processes cannot share {recipe.calibration.steps} "
                "calibration steps",
                where=loaded.where("calibration.steps"),
                fix=f"calibration.steps={distributed.world_size()} or more",
            )
        )


def _recorded(
    loaded: LoadedRecipe,
    command: str,
    run_dir: Path,
    work: Callable[[RunRecord, Observer], None],
    observer: Observer,
    before: dict[str, Any],
) -> RunRecord:
    """Do the work; run.json says how it ended, however it ended.

    What was recorded before stands until it is replaced: a run that cannot go on loses nothing.
    """
    from sparsegrad_cli.records.environment import collect, git_state

    recipe = loaded.recipe
    record = RunRecord(
        run_dir,
        {
            "command": command,
            "name": run_dir.name,
            "recipe_digest": digest(recipe),
            "seed": recipe.seed,
            "output_dir": str(run_dir),
            "processes": distributed.world_size(),
            "environment": collect("cpu" if recipe.train.use_cpu else None),
            "git": git_state(Path.cwd()),
        },
        before,
    )
    started = time.perf_counter()
    try:
        with mapped_errors(_AGAIN[command]):
            record.save()
            if distributed.is_rank_zero() and before.get("extended"):
                # After the record, by which the run is known: the same command mends a kill here.
                write_text_atomic(run_dir / "recipe.yaml", to_yaml(recipe))
            work(record, observer)
            record.data.setdefault("time", {})["total_s"] = time.perf_counter() - started
            record.finish()
    except SparsegradError as error:
        _record_failure(record, error)
        if isinstance(error, InterruptedRunError) and record.data["status"] == "done":
            error.fix = f"the run is done: sparsegrad report {run_dir}"
        raise
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        _record_failure(record, SparsegradError(what, fix="run again with --debug"))
        raise
    return record


def _record_failure(record: RunRecord, error: SparsegradError) -> None:
    """Write the status; a disk too full even for that must not hide the first error."""
    try:
        record.finish(error)
    except SparsegradError:
        return


def _write_report(record: RunRecord, observer: Observer) -> None:
    """The run is done, whatever becomes of its report."""
    from sparsegrad_cli.records.store import write_text_atomic
    from sparsegrad_cli.report.html import write_run_html
    from sparsegrad_cli.report.markdown import run_markdown

    observer.phase("report")
    try:
        write_text_atomic(record.path / _REPORT[0], run_markdown(record.data))
        write_run_html(record.data, record.path / _REPORT[1])
    except (OSError, DiskError) as error:
        reason = error.what if isinstance(error, DiskError) else str(error)
        raise DiskError(
            f"the run is done, but its report could not be written: {reason}",
            where=str(record.path),
            fix=f"free some space, then sparsegrad report {record.path}",
        ) from error
