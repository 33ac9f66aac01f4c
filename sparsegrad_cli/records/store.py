"""run.json and compare.json on disk: read with checks, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import exists, is_file, is_folder

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


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Write JSON so that the file is at every moment whole: the old one or the new one.

    Args:
        path: the file; its folder must exist.
        data: JSON values, mappings and sequences; NaN and infinities are written as null, since
            JSON has no word for them.

    Raises:
        DiskError: it could not be written; what was there before is untouched.
    """
    text = json.dumps(_finite(data), indent=1, allow_nan=False, ensure_ascii=True)
    write_text_atomic(path, text + "\n")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text through a temporary file in the same folder, fsync and a rename.

    Raises:
        DiskError: it could not be written; what was there before is untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        # Not mkstemp: its files are 0600, and the umask cannot be read without a race.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode("utf-8", "replace"))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise DiskError(
            f"{target.name} could not be written: {error.strerror or error}",
            where=str(target),
            fix="free some space or check the permissions; what was there before is kept",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename
            temporary.unlink()


def torn_writes(path: str | Path) -> list[Path]:
    """What of a file is being written, or was left by a kill in the middle of that."""
    target = Path(path)
    return list(target.parent.glob(f".{target.name}.*.tmp"))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
