"""Open a run's folder for this process alone, record how the run ends, and report it.

Imports no torch, so that a bad recipe or folder is refused at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.error_mapping import mapped_errors
from sparsegrad_cli.errors import DiskError, InterruptedRunError, SparsegradError
from sparsegrad_cli.io.atomic import write_text_atomic
from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, digest, to_yaml
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.records.run import RunRecord, TimeBlock
from sparsegrad_cli.records.store import RUN, RunWriter, load_run
from sparsegrad_cli.run.folder import (
    adapter_file,
    choose_folder,
    lock_folder,
    prepare_folder,
)
from sparsegrad_cli.run.launcher import check_sharding
from sparsegrad_cli.run.preflight import check, check_calibration_share

Command = Literal["train", "calibrate"]
REPORTS = ("report.md", "report.html")
_AGAIN = {
    "train": "--resume continues from the last checkpoint, if there is one",
    "calibrate": "run it again with --overwrite",
}


@dataclass(frozen=True)
class Run:
    """A run whose folder is open.

    Attributes:
        loaded: the resolved recipe, with the file and line of each key.
        writer: keeps run.json up to date.
        observer: receives progress.
        resume: continue the run that the folder holds.
        done: whether the run had already finished.
        seconds: wall time by phase, for the record.
    """

    loaded: LoadedRecipe
    writer: RunWriter
    observer: Observer
    resume: bool = False
    done: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.loaded.recipe

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.writer.path

    def begin_phase(self, name: str, detail: str) -> None:
        """Announce a phase: load, calibrate, energy, train or evaluate."""
        interruption.set_phase(f"the {name} phase ({detail})")
        self.observer.phase(name, detail)


@contextmanager
def open_run(
    loaded: LoadedRecipe,
    command: Command,
    observer: Observer | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[Run]:
    """Open the folder of a run, and record and report the run when the context ends.

    Inside the context, the folder is locked for this process, SIGINT and SIGTERM end the run, and
    run.json has the status ``running``. Afterwards, its status says how the run ended.

    Args:
        loaded: the recipe.
        command: the command to run in the folder.
        observer: receives progress; closed at the end.
        resume: see :func:`sparsegrad_cli.run.folder.prepare_folder`.
        overwrite: see :func:`sparsegrad_cli.run.folder.prepare_folder`.

    Raises:
        SparsegradError: the recipe or the folder is refused, or the run failed; run.json holds the
            same error.
    """
    observer = observer or Observer()
    with distributed.errors_on_rank_zero():
        check_calibration_share(loaded, command)
        check_sharding(loaded, command, resume=resume)
        if not resume:
            check(loaded, trains=command == "train")
    distributed.init(use_cpu=loaded.recipe.train.use_cpu)
    with ExitStack() as held:
        held.callback(observer.close)
        held.enter_context(interruption.handle_signals(observer.note, _AGAIN[command]))
        # Rank zero locks the folder for all processes of the run.
        path, before, done = distributed.from_rank_zero(
            lambda: _lock_and_prepare(held, loaded, command, observer, resume, overwrite)
        )
        if done and before is not None:
            observer.note("the run is done: nothing is trained again")
            writer = RunWriter(path)
            writer.record = before.changed(output_dir=str(path))
            yield Run(loaded, writer, observer, resume=resume, done=True)
        else:
            if resume:
                with distributed.errors_on_rank_zero():
                    check(loaded, trains=command == "train")
            writer = _new_record(loaded, command, path, before)
            run = Run(loaded, writer, observer, resume=resume)
            with _recorded_end(writer, command):
                writer.save()
                if distributed.is_rank_zero() and writer.record.extended:
                    # Written after the record, which identifies the run. If the run is killed in
                    # between, the same command writes it.
                    write_text_atomic(path / "recipe.yaml", to_yaml(loaded.recipe))
                yield run
        reported = done and all(is_file(path / name) for name in REPORTS)
        if distributed.is_rank_zero() and not reported:
            with mapped_errors(again=f"sparsegrad report {path}"):
                write_report(writer, observer)


def _lock_and_prepare(
    held: ExitStack,
    loaded: LoadedRecipe,
    command: Command,
    observer: Observer,
    resume: bool,
    overwrite: bool,
) -> tuple[Path, RunRecord | None, bool]:
    """Choose, lock and prepare the folder of a run.

    Returns:
        The folder, what a resumed run has recorded so far, and whether that run is done. A run
        whose adapter is missing is not done: the adapter is made again.
    """
    path = choose_folder(loaded.recipe, command)
    held.enter_context(lock_folder(path, observer.note))
    extended = prepare_folder(path, loaded.recipe, resume=resume, overwrite=overwrite)
    before = load_run(path) if resume and is_file(path / RUN) else None
    if before is not None and before.command != command:  # After calibrate, only the basis is used.
        before = None
    done = before is not None and before.status == "done" and adapter_file(path) is not None
    if extended is not None:
        before, done = before or RunRecord(status="running"), False
        before = before.changed(extended=[*before.extended, extended])
    return path, before, done


def _new_record(
    loaded: LoadedRecipe, command: Command, path: Path, before: RunRecord | None
) -> RunWriter:
    """Begin the record. Earlier blocks stay until they are replaced.

    A run that fails to resume therefore loses nothing.
    """
    from sparsegrad_cli.records.environment import collect, git_state

    recipe = loaded.recipe
    return RunWriter(
        path,
        before,
        command=command,
        name=path.name,
        recipe_digest=digest(recipe),
        seed=recipe.seed,
        output_dir=str(path),
        processes=distributed.world_size(),
        environment=collect("cpu" if recipe.train.use_cpu else None),
        git=git_state(Path.cwd()),
    )


@contextmanager
def _recorded_end(writer: RunWriter, command: Command) -> Iterator[None]:
    """Record in run.json how the work inside the context ended."""
    started = time.perf_counter()
    try:
        with mapped_errors(_AGAIN[command]):
            yield
            times = writer.record.time or TimeBlock()
            total_s = time.perf_counter() - started
            writer.record = writer.record.changed(time=times.changed(total_s=total_s))
            writer.finish()
    except SparsegradError as error:
        _record_failure(writer, error)
        if isinstance(error, InterruptedRunError) and writer.record.status == "done":
            error.fix = f"the run is done: sparsegrad report {writer.path}"
        raise
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        _record_failure(writer, SparsegradError(what, fix="run again with --debug"))
        raise


def _record_failure(writer: RunWriter, error: SparsegradError) -> None:
    """Write the status. If that fails, as on a full disk, the first error is still raised."""
    try:
        writer.finish(error)
    except SparsegradError:
        return


def write_report(writer: RunWriter, observer: Observer) -> None:
    """Write report.md and report.html of a finished run.

    Raises:
        DiskError: a report could not be written; the status of the run stays ``done``.
    """
    from sparsegrad_cli.report.render import write_run_report

    interruption.set_phase("writing the report", finishing=True)
    observer.phase("report")
    try:
        write_run_report(writer.path, writer.record)
    except (OSError, DiskError) as error:
        reason = error.what if isinstance(error, DiskError) else str(error)
        raise DiskError(
            f"the run is done, but its report could not be written: {reason}",
            where=str(writer.path),
            fix=f"free some space, then sparsegrad report {writer.path}",
        ) from error
