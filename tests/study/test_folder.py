"""A study's folder is used by one process, and other files in it stay unchanged."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.folder_lock_process import lock_holder, read_process_id

from sparsegrad_cli.errors import BusyError, SparsegradError, UsageError
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.recipe.study import LoadedStudy, make_study
from sparsegrad_cli.study.folder import StudyFolder


@pytest.fixture(scope="module")
def study() -> LoadedStudy:
    return make_study(None, ("lora",), 1, ())


def begin(path: Path, study: LoadedStudy, *, overwrite: bool = False) -> StudyFolder:
    folder = StudyFolder(path)
    with folder.held(overwrite=overwrite):
        folder.begin(lambda: study, overwrite=overwrite)
        write_json_atomic(folder.record_file, {"schema": 1, "status": "running", "cells": []})
    return folder


def test_a_second_coordinator_is_refused_with_the_name_of_the_first(
    tmp_path: Path, study: LoadedStudy
) -> None:
    begin(tmp_path / "c", study)
    with lock_holder(tmp_path / "c") as process:
        read_process_id(process)
        said = rf"in use by process {process.pid} on {socket.gethostname()}, since 2"
        for overwrite in (False, True):
            with pytest.raises(BusyError, match=said):
                begin(tmp_path / "c", study, overwrite=overwrite)
    begin(tmp_path / "c", study)
    assert not (tmp_path / "c" / ".lock").exists()


def test_a_folder_with_something_else_in_it_is_refused_and_unchanged(
    tmp_path: Path, study: LoadedStudy
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not empty"):
        begin(tmp_path, study)
    with pytest.raises(UsageError, match="is a file"):
        begin(tmp_path / "thesis.txt", study)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    begin(tmp_path, study, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "left", ["cells/", ".compare.json.0123456789ab.tmp", "tuning.journal", ".lock", "slurm/"]
)
def test_files_of_a_study_killed_before_its_first_record_are_accepted(
    tmp_path: Path, study: LoadedStudy, left: str
) -> None:
    if left.endswith("/"):
        (tmp_path / left).mkdir()
    else:
        (tmp_path / left).touch()
    begin(tmp_path, study)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("there", [False, True])
def test_an_empty_folder_made_for_a_study_is_removed(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "c"
    if there:
        folder.mkdir()
    with pytest.raises(SparsegradError), StudyFolder(folder).held(overwrite=False):
        raise SparsegradError("the budget cannot be met")
    assert folder.exists() is there


def test_overwriting_removes_runs_and_keeps_other_files(tmp_path: Path, study: LoadedStudy) -> None:
    begin(tmp_path, study)
    (tmp_path / "cells" / "old").mkdir()
    (tmp_path / "tuning.db").touch()  # of the version before
    (tmp_path / "notes.txt").touch()
    begin(tmp_path, study, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "compare.json", "notes.txt"}
    assert not list((tmp_path / "cells").iterdir())
