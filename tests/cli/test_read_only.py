"""Folders that can be read but not written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Cli
from support.record_samples import run_record, study_record


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which no file can be made, as on a read-only file system."""
    folder, real = tmp_path / "theirs", os.open
    folder.mkdir()

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and Path(os.fsdecode(path)).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    return folder


@pytest.mark.parametrize(
    ("name", "made"), [("run.json", run_record), ("compare.json", study_record)]
)
def test_report_is_shown_though_its_files_cannot_be_written(
    cli: Cli, read_only: Path, name: str, made: Any
) -> None:
    (read_only / name).write_text(json.dumps(made()))
    shown = cli("report", str(read_only))
    assert shown.code == 0 and len(shown.out.splitlines()) > 5
    assert "its files were not written: report.md could not be written: Read-only" in shown.flat
    assert "free some space" not in shown.flat and "report.html" not in shown.out
    assert json.loads(cli("report", str(read_only), "--json").out)["output_dir"] == str(read_only)
    assert [path.name for path in read_only.iterdir()] == [name]
