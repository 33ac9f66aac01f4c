"""run.json and compare.json on disk: read with checks, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.atomic import torn_writes, write_json_atomic, write_text_atomic
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import exists, is_file, is_folder

__all__ = ["load_record", "torn_writes", "write_json_atomic", "write_text_atomic"]
SCHEMA = 1
FILES = ("run.json", "compare.json")
REPORTS = ("report.html", "report.md", "report.tex")


def load_record(path: str | Path) -> dict[str, Any]:
    """Read the record of a run or a comparison.

    Args:
        path: the file, or the folder that holds ``run.json`` or ``compare.json`` (the run's where
            there are both).

    Returns:
        The record; numbers JSON cannot hold (NaN, infinities) are None.

    Raises:
        UsageError: no such file, or a folder without a record.
        FileFormatError: not JSON, not an object, or of a schema this version does not read.
    """
    file = _find(Path(path))
    try:
        record = plain_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(
            f"{file.name} is damaged: {error}",
            where=str(file),
            fix="run again with --overwrite, or bring the file back from a copy",
        ) from error
    if not isinstance(record, dict):
        raise FileFormatError(
            f"{file.name} holds no record (a JSON object is expected)",
            where=str(file),
            fix="name the folder or the run.json of a run",
        )
    _check_schema(record, file)
    return record


def _find(path: Path) -> Path:
    if not is_folder(path):
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
    fix = "install the sparsegrad that wrote it, or a newer one" if newer else "run again"
    what = f"has schema {schema!r}" if "schema" in record else "names no schema"
    raise FileFormatError(
        f"{file.name} {what}; this version reads schema {SCHEMA}", where=str(file), fix=fix
    )
