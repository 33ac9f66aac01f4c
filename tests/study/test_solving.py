"""One process solves a budget; who comes meanwhile waits for it, and reads what it picked."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError, SparsegradError, UsageError
from sparsegrad_cli.records.store import write_json_atomic
from sparsegrad_cli.study.folder import StudyFolder
from sparsegrad_cli.study.solving import picked, solving


class Later(threading.Thread):
    """Somebody who begins to share the study while its budget is being solved."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.place = StudyFolder(folder)
        self.told: list[str] = []
        self.found: list[Any] = []

    def run(self) -> None:
        with solving(self.place, self.told.append, overwrite=False):
            self.found.append(picked(self.place))

    def waits(self) -> bool:
        """Whether it has come to wait; it is given a minute."""
        for _ in range(600):
            if self.told:
                return not self.found
            time.sleep(0.1)
        return False


def nobody(line: str) -> None:
    raise AssertionError(f"nobody is waited for: {line}")


def test_who_comes_meanwhile_waits_and_reads_what_was_picked(tmp_path: Path) -> None:
    place, later = StudyFolder(tmp_path / "c"), Later(tmp_path / "c")
    with solving(place, nobody, overwrite=False):
        assert picked(place) == {}
        later.start()
        assert later.waits()
        record = {"schema": 1, "budget": {"match": "trainable=7"}}
        write_json_atomic(place.path / "compare.json", record)
    later.join(60)
    assert later.found == [{"match": "trainable=7"}]
    (line,) = later.told
    assert f"process {os.getpid()}" in line and "solves the budget" in line
    assert sorted(path.name for path in place.path.iterdir()) == ["cells", "compare.json"]


def test_who_waits_for_one_that_gives_up_is_next(tmp_path: Path) -> None:
    place, later = StudyFolder(tmp_path / "c"), Later(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt), solving(place, nobody, overwrite=False):
        later.start()
        assert later.waits()
        raise KeyboardInterrupt
    later.join(60)
    assert later.found == [{}]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "c"
    if there:
        folder.mkdir()
    with pytest.raises(SparsegradError), solving(StudyFolder(folder), nobody, overwrite=False):
        raise SparsegradError("too little")
    assert folder.exists() is there


def test_what_a_killed_one_left_is_in_nobodys_way(tmp_path: Path) -> None:
    place = StudyFolder(tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / ".solving.claim").write_text("process 1 on there\n", encoding="utf-8")
    with solving(place, nobody, overwrite=False):
        assert picked(place) == {}


def test_folders_of_others_links_and_damaged_records_are_refused(tmp_path: Path) -> None:
    foreign, linked, damaged = (tmp_path / name for name in ("foreign", "linked", "damaged"))
    for folder in (foreign, linked, damaged):
        folder.mkdir()
    (foreign / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError), solving(StudyFolder(foreign), nobody, overwrite=False):
        raise AssertionError("it is not entered")
    (linked / ".solving.claim").symlink_to(foreign / "thesis.txt")
    with pytest.raises(DiskError), solving(StudyFolder(linked), nobody, overwrite=False):
        raise AssertionError("it is not entered")
    assert (foreign / "thesis.txt").read_text(encoding="utf-8") == "mine"
    (damaged / "compare.json").write_text('{"schema": 1, "budget": [', encoding="utf-8")
    with pytest.raises(FileFormatError):
        picked(StudyFolder(damaged))
