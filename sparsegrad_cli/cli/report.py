"""``sparsegrad report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsegrad_cli.cli.arguments import Debug, Json
from sparsegrad_cli.cli.output import report_line, rewrite_study_report, show
from sparsegrad_cli.cli.progress import make_observer
from sparsegrad_cli.errors import DiskError, SparsegradError, UsageError
from sparsegrad_cli.io.paths import is_file, is_folder, make_folder

if TYPE_CHECKING:
    from sparsegrad_cli.records.base import Record
    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.report.compared_runs import NamedRun
    from sparsegrad_cli.report.document import Document

Folders = Annotated[
    list[Path],
    typer.Argument(
        help="Folder of a run, a comparison, an evaluation or an export; or of several runs, "
        "which are set side by side.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Several runs: folder for their report."),
]


def report(
    folders: Folders,
    output_dir: OutputDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a command recorded, and write its reports (HTML, Markdown and LaTeX) again.

    Several finished runs are set side by side without any training: scores, memory, time, and
    what differs between their recipes.

    [bold]sparsegrad report runs/reviews[/bold]

    [bold]sparsegrad report runs/lora runs/sparsegrad -o reports/both[/bold]
    """
    if len(folders) > 1:
        _side_by_side(folders, output_dir, as_json=as_json)
        return
    if output_dir is not None:
        raise UsageError(
            "--output-dir is for several runs; the report of one is written into its folder",
            where="command line",
            fix=f"sparsegrad report {folders[0]}",
        )
    path = folders[0]
    found = _other_record(path)
    if found is not None:
        record, document, screen = found
        footer = _written(path, lambda: _write(path, document))
        content = record.to_json() | {"output_dir": str(path)}
        show(content, screen, as_json=as_json, footer=footer)
        return
    _run_or_study(path, as_json=as_json)


def _run_or_study(path: Path, *, as_json: bool) -> None:
    """Show a run or a comparison, with its current status."""
    from sparsegrad_cli.io.locks import owner_of
    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.records.store import load_run_or_study
    from sparsegrad_cli.report.render import write_run_report
    from sparsegrad_cli.report.run import run_screen
    from sparsegrad_cli.report.study import study_screen
    from sparsegrad_cli.study.evidence import up_to_date

    folder = path if is_folder(path) else path.parent
    found = load_run_or_study(path)
    if isinstance(found, RunRecord):
        record = _current(found, folder)
        footer = _written(folder, lambda: write_run_report(folder, record))
        content = record.to_json() | {"output_dir": str(folder)}
        show(content, run_screen(record), as_json=as_json, footer=footer)
        return
    study = up_to_date(found, running=owner_of(folder) is not None, folder=folder)
    footer = _written(folder, lambda: rewrite_study_report(folder, study))
    content = study.to_json() | {"output_dir": str(folder)}
    show(content, study_screen(study), as_json=as_json, footer=footer)


def _current(record: RunRecord, folder: Path) -> RunRecord:
    """Return a record with the status and the metrics of a run that was killed."""
    from sparsegrad_cli.run.folder import with_current_status
    from sparsegrad_cli.run.step_lines import with_logged_metrics

    return with_logged_metrics(with_current_status(record, folder), folder)


def _other_record(path: Path) -> tuple[Record, Document, Document] | None:
    """Return the record, the report and the screen of an evaluation or an export."""
    from sparsegrad_cli.records.store import EVALUATION, EXPORT, FILES, load

    if not is_folder(path) or any(is_file(path / name) for name in FILES):
        return None
    if is_file(path / EVALUATION):
        from sparsegrad_cli.records.evaluation import EvaluationRecord
        from sparsegrad_cli.report.evaluation import evaluation_document, evaluation_screen

        evaluation = load(EvaluationRecord, path / EVALUATION)
        return evaluation, evaluation_document(evaluation), evaluation_screen(evaluation)
    if is_file(path / EXPORT):
        from sparsegrad_cli.records.export import ExportRecord
        from sparsegrad_cli.report.export import export_document, export_screen

        export = load(ExportRecord, path / EXPORT)
        return export, export_document(export), export_screen(export)
    return None


def _side_by_side(folders: Sequence[Path], output_dir: Path | None, *, as_json: bool) -> None:
    """Show several runs, and write their report if a folder for it is named."""
    from sparsegrad_cli.report.compared_runs import compared_document, incomparable

    repeated = [folder for folder in folders if folders.count(folder) > 1]
    if repeated:
        raise UsageError(f"expected different runs, got {repeated[0]} twice", where="command line")
    names = [folder.name for folder in folders]
    runs = [
        _named_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    document = compared_document(runs)
    footer = None
    if output_dir is not None:
        target = output_dir
        footer = _written(target, lambda: _write(target, document))
    content: dict[str, Any] = {
        "runs": [each.run.to_json() | {"output_dir": each.folder} for each in runs],
        "not_comparable": incomparable(runs),
    }
    show(content, document, as_json=as_json, footer=footer)


def _named_run(path: Path, name: str) -> NamedRun:
    """Read a run and its resolved recipe."""
    from sparsegrad_cli.recipe.load_recipe import leaves, load_recipe, to_plain
    from sparsegrad_cli.records.store import load_run
    from sparsegrad_cli.report.compared_runs import NamedRun

    folder = path if is_folder(path) else path.parent
    record = _current(load_run(path), folder)
    if record.command == "calibrate":
        raise UsageError(
            f"{folder} holds a calibration, which has no scores",
            where="command line",
            fix="name training runs",
        )
    try:
        recipe = load_recipe(folder / "recipe.yaml", data=False).recipe
    except SparsegradError:
        return NamedRun(name, str(folder), record, {})  # The report says so.
    keys = dict(leaves(to_plain(recipe)))
    if not (recipe.method.calibrates or recipe.method.reads_batches):
        keys = {key: held for key, held in keys.items() if not key.startswith("calibration.")}
    return NamedRun(name, str(folder), record, keys)


def _write(folder: Path, document: Document) -> None:
    from sparsegrad_cli.report.render import write_reports

    try:
        make_folder(folder)
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error.strerror or error}") from error
    write_reports(folder, document)


def _written(folder: Path, write: Callable[[], object]) -> str | None:
    """Write the report files, and return the line that names them.

    A folder that cannot be written, such as another user's, can still be read: then a note on
    stderr says why there are no files, and the report is shown.
    """
    try:
        write()
    except DiskError as error:
        with make_observer(quiet=False) as observer:
            observer.note(f"the report is shown, but its files were not written: {error.what}")
        return None
    return report_line(folder)
