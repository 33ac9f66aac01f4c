"""Read and check records, write them atomically, and keep the record of a run up to date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import FileFormatError, SparsegradError, UsageError
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import exists, is_file, is_folder
from sparsegrad_cli.records.base import SCHEMA, Record, now, problems
from sparsegrad_cli.records.run import ErrorBlock, RunRecord
from sparsegrad_cli.records.study import StudyRecord

RUN, STUDY, EXPORT = "run.json", "compare.json", "export.json"
EVALUATION = "evaluation.json"
FILES = (RUN, STUDY)
REPORTS = ("report.html", "report.md", "report.tex")
_RESULTS = ("metrics", "memory", "time", "sizes", "sparsity")
R = TypeVar("R", bound=Record)


def load_run(path: str | Path) -> RunRecord:
    """Read and check the record of a run.

    Args:
        path: the run's folder, or its run.json.

    Raises:
        UsageError: the file does not exist, or belongs to a comparison.
        FileFormatError: the file is damaged, or has a schema that this version does not read.
    """
    found = load_run_or_study(path)
    if isinstance(found, RunRecord):
        return found
    folder = Path(path) if is_folder(path) else Path(path).parent
    raise UsageError(
        f"expected a run, but {folder} is a comparison",
        fix=f"name one of its runs in {folder / 'cells'}",
    )


def load_study(path: str | Path) -> StudyRecord:
    """Read and check the record of a comparison; arguments and errors as :func:`load_run`."""
    folder = Path(path)
    found = load_run_or_study(folder / STUDY if is_file(folder / STUDY) else folder)
    if isinstance(found, StudyRecord):
        return found
    raise UsageError(f"expected a comparison, but {path} holds a run")


def load_run_or_study(path: str | Path) -> RunRecord | StudyRecord:
    """Read and check run.json or compare.json; of a folder with both, run.json.

    Raises:
        UsageError, FileFormatError: as :func:`load_run`.
    """
    file = _find(Path(path))
    found = read_object(file)
    if "cells" in found:
        return validated(StudyRecord, found, file)
    if file.name == STUDY:
        _check_schema(found, file)
        raise FileFormatError(
            f"{STUDY} is not the record of a comparison: it lists no runs under cells",
            where=str(file),
            fix=repair_advice(file),
        )
    return validated(RunRecord, found, file)


def load(model: type[R], file: Path) -> R:
    """Read and check a file that holds a record of this kind.

    Raises:
        UsageError, FileFormatError: as :func:`load_run`.
    """
    return validated(model, read_object(file), file)


def write(record: Record, file: Path) -> None:
    """Write a record atomically; NaN and infinities become null.

    Raises:
        DiskError: The file cannot be written; the earlier file is unchanged.
    """
    write_json_atomic(file, record.to_json())


def repair_advice(file: Path) -> str:
    """Return what to do about a damaged record, for every command that reads it.

    Nothing that it advises loses trained parameters.
    """
    folder = file.parent
    if file.name == STUDY:
        return (
            "restore it from a copy; without one, the runs are still whole: "
            f"sparsegrad report {folder / 'cells'}/NAME"
        )
    aside = f"restore it from a copy; without one, move it aside (mv {file} {file}.damaged)"
    if file.name == RUN:
        return (
            f"{aside}: sparsegrad train {folder} --resume then reads recipe.yaml and continues "
            "from the last checkpoint, so a finished run trains the steps after it again"
        )
    return f"{aside} and run the command that wrote it again"


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. NaN and infinities become None.

    Raises:
        UsageError: the file cannot be read.
        FileFormatError: it is not JSON, nested too deeply, or not an object.
    """
    try:
        found = plain_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(
            f"{file.name} is damaged: {error}", where=str(file), fix=repair_advice(file)
        ) from error
    if not isinstance(found, dict):
        raise FileFormatError(
            f"expected a JSON object in {file.name}, got {type(found).__name__}",
            where=str(file),
            fix=repair_advice(file),
        )
    return found


def validated(model: type[R], found: Mapping[str, Any], file: Path) -> R:
    """Return an object from a file as a record.

    Raises:
        FileFormatError: it has another schema, or a value is not what its key expects.
    """
    _check_schema(found, file)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise FileFormatError(
            f"{file.name} is damaged: {problems(error)}", where=str(file), fix=repair_advice(file)
        ) from error


def _find(path: Path) -> Path:
    if not is_folder(path):
        if is_file(path) and path.name not in FILES:
            raise UsageError(
                f"expected a run's folder, got the file {path}",
                where="command line",
                fix="name the folder of a run or a comparison",
            )
        if exists(path):
            return path
        raise UsageError(f"{path} does not exist", fix="name the folder of a run or a comparison")
    for name in FILES:
        if is_file(path / name):
            return path / name
    raise UsageError(
        f"the folder {path} holds neither run.json nor compare.json",
        fix="name the folder of a run or a comparison",
    )


def _check_schema(record: Mapping[str, Any], file: Path) -> None:
    schema = record.get("schema")
    if schema == SCHEMA and not isinstance(schema, bool):
        return
    newer = isinstance(schema, int) and schema > SCHEMA
    fix = "install the sparsegrad that wrote it, or a newer one" if newer else repair_advice(file)
    what = f"has schema {schema!r}" if "schema" in record else "names no schema"
    raise FileFormatError(
        f"{file.name} {what}; this version reads schema {SCHEMA}", where=str(file), fix=fix
    )


class RunWriter:
    """Keep run.json up to date: rank zero writes the whole file at every milestone.

    Args:
        folder: The run's folder.
        before: The earlier record of a resumed run. Its blocks are kept until they are set again.
        **blocks: First blocks. The status is ``running``.

    Attributes:
        path: The run's folder.
        record: The current record.
    """

    def __init__(self, folder: Path, before: RunRecord | None = None, **blocks: object) -> None:
        self.path = folder
        begun = {"status": "running", "error": None, "started": now(), "finished": None}
        first = before or RunRecord(status="running")
        self.record = first.changed(**begun, **blocks)

    def save(self, **blocks: object) -> None:
        """Set blocks, each a model of records/run.py or the same as plain data, and write the file.

        Raises:
            ValidationError: A block does not exist, or is not what its model expects.
            DiskError: The file cannot be written.
        """
        self.record = self.record.changed(**blocks)
        if distributed.is_rank_zero():
            write(self.record, self.path / RUN)

    def forget_results(self) -> None:
        """Drop the results of an earlier end of training."""
        self.record = self.record.without(*_RESULTS)

    def finish(self, error: SparsegradError | None = None) -> None:
        """Set the final status and write the file. A run that is done stays done."""
        if self.record.status == "done":
            error = None
        self.save(
            status=error.status if error else "done",
            error=None if error is None else error_block(error),
            finished=now(),
        )


def error_block(error: SparsegradError) -> ErrorBlock:
    """Return an error as a record keeps it."""
    known = {key: value for key, value in error.details.items() if key in ErrorBlock.model_fields}
    return ErrorBlock(title=error.title, what=error.what, where=error.where, fix=error.fix, **known)
