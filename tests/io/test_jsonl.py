"""JSON-lines files: a torn last line is cut off, and files of another format are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.io.jsonl import Journal, read_records

KIND = "sparsegrad-test-1"
RECORDS: list[dict[str, Any]] = [{"a": 1}, {"a": "é\u2028\ud800\n"}, {"a": None}]


def written(path: Path) -> bytes:
    with Journal(path, KIND) as journal:
        for record in RECORDS:
            journal.append(record)
    return path.read_bytes()


def test_written_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    content = written(path)
    assert content.count(b"\n") == 3 and content.isascii()
    with Journal(path, KIND) as journal:
        assert journal.records == RECORDS and not journal.torn
        journal.append({"b": 2})
        assert journal.records[-1] == {"b": 2}
    assert path.read_bytes().startswith(content)
    assert json.loads(path.read_bytes()[len(content) :]) == {"format": KIND, "b": 2}


def test_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    content = written(path)
    last = content[:-1].rindex(b"\n") + 1
    for end in range(last + 1, len(content) - 1):
        path.write_bytes(content[:end])
        with Journal(path, KIND) as journal:
            assert journal.torn and journal.records == RECORDS[:2]
            journal.append(RECORDS[2])
        assert path.read_bytes() == content
    path.write_bytes(content[:-1])  # all but the line break: whole
    with Journal(path, KIND) as journal:
        assert not journal.torn and journal.records == RECORDS
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"precious",
        b"precious\nnotes\n",
        b'{"a": 1}\n',
        b'{"format": "sparsegrad-other-1", "a": 1}\n',
        b'{"format": "sparsegrad-test-1", "a": 1}\n{"a": ',
        b'{"format": "sparsegrad-test-1", "a": \n{"format": "sparsegrad-test-1"}\n',
        b"\x00\xff",
        b"3",
    ],
)
def test_file_of_another_format_is_left_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileFormatError):
        Journal(path, KIND)
    assert path.read_bytes() == content


def test_journal_admits_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, KIND), pytest.raises(UsageError, match="another process"):
        Journal(path, KIND)
    Journal(path, KIND).__exit__()


def test_journal_refuses_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="ordinary"):
        Journal(tmp_path / "pipe", KIND)
    with pytest.raises(DiskError):
        Journal(tmp_path, KIND)
    with pytest.raises(DiskError):
        Journal(tmp_path / "pipe" / "j.jsonl", KIND)


def test_full_disk_leaves_no_part_of_the_line(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "j.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path, KIND) as journal:
        journal.append({"a": 1})
        content = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 10, before[1]))
        try:
            with pytest.raises(DiskError, match="cannot write"):
                journal.append({"a": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == content
        journal.append({"a": 2})
    assert read_records(path)[0] == [{"format": KIND, "a": 1}, {"format": KIND, "a": 2}]
