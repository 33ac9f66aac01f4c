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
from sparsegrad_cli.records.run import RunRecord, TimeBlock
from sparsegrad_cli.records.store import RUN, load_run, write_text_atomic
from sparsegrad_cli.records.writer import RunWriter
from sparsegrad_cli.run import preflight
from sparsegrad_cli.run.folder import (
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
    work: Callable[[RunWriter, Observer], None],
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
        before: RunRecord | None = None
        done = False
        if resume:
            before, done = distributed.from_rank_zero(lambda: _recorded_before(run_dir, command))
        if extended is not None:
            before, done = before or RunRecord(status="running"), False
            before = before.changed(extended=[*before.extended, extended])
        if resume and not done:
            _check_outside(loaded, command)
        if done and before is not None:
            observer.note("the run is done: nothing is trained again")
            record = before.changed(output_dir=str(run_dir))
        else:
            record = _recorded(loaded, command, run_dir, work, observer, before)
        reported = done and all(is_file(run_dir / name) for name in _REPORT)
        if distributed.is_rank_zero() and not reported:
            with mapped_errors(again=f"sparsegrad report {run_dir}"):
                _write_report(record, run_dir, observer)
    return record.to_json()


def _recorded_before(run_dir: Path, command: str) -> tuple[RunRecord | None, bool]:
    """What a run that is resumed has recorded so far, and whether it is done.

    One whose adapter has been taken away is not: that is made again.
    """
    found = load_run(run_dir) if is_file(run_dir / RUN) else None
    if found is None or found.command != command:  # a calibration's basis is of use, no more
        return None, False
    return found, found.status == "done" and adapter_file(run_dir) is not None


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
    wanted = recipe.method.name == "sparsegrad" and recipe.calibration.basis is None
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
    work: Callable[[RunWriter, Observer], None],
    observer: Observer,
    before: RunRecord | None,
) -> RunRecord:
    """Do the work; run.json says how it ended, however it ended.

    What was recorded before stands until it is replaced: a run that cannot go on loses nothing.
    """
    from sparsegrad_cli.records.environment import collect, git_state

    recipe = loaded.recipe
    writer = RunWriter(
        run_dir,
        before,
        command=command,
        name=run_dir.name,
        recipe_digest=digest(recipe),
        seed=recipe.seed,
        output_dir=str(run_dir),
        processes=distributed.world_size(),
        environment=collect("cpu" if recipe.train.use_cpu else None),
        git=git_state(Path.cwd()),
    )
    started = time.perf_counter()
    try:
        with mapped_errors(_AGAIN[command]):
            writer.save()
            if distributed.is_rank_zero() and writer.record.extended:
                # After the record, by which the run is known: the same command mends a kill here.
                write_text_atomic(run_dir / "recipe.yaml", to_yaml(recipe))
            work(writer, observer)
            times = writer.record.time or TimeBlock()
            writer.record = writer.record.changed(
                time=times.changed(total_s=time.perf_counter() - started)
            )
            writer.finish()
    except SparsegradError as error:
        _record_failure(writer, error)
        if isinstance(error, InterruptedRunError) and writer.record.status == "done":
            error.fix = f"the run is done: sparsegrad report {run_dir}"
        raise
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        _record_failure(writer, SparsegradError(what, fix="run again with --debug"))
        raise
    return writer.record


def _record_failure(writer: RunWriter, error: SparsegradError) -> None:
    """Write the status; a disk too full even for that must not hide the first error."""
    try:
        writer.finish(error)
    except SparsegradError:
        return


def _write_report(record: RunRecord, folder: Path, observer: Observer) -> None:
    """The run is done, whatever becomes of its report."""
    from sparsegrad_cli.records.store import write_text_atomic
    from sparsegrad_cli.report.html import write_run_html
    from sparsegrad_cli.report.markdown import run_markdown

    content = record.to_json()
    observer.phase("report")
    try:
        write_text_atomic(folder / _REPORT[0], run_markdown(content))
        write_run_html(content, folder / _REPORT[1])
    except (OSError, DiskError) as error:
        reason = error.what if isinstance(error, DiskError) else str(error)
        raise DiskError(
            f"the run is done, but its report could not be written: {reason}",
            where=str(folder),
            fix=f"free some space, then sparsegrad report {folder}",
        ) from error
