"""The property tests detect every kind of forbidden behaviour."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import hostile_cases as hostility
from support.hostile_cases import scratch_folder
from support.hostile_summary import PROPERTY, summary_table

from sparsegrad_cli.errors import SparsegradError


class Call:
    """Unpickling this calls ``os.getcwd``."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return os.getcwd, ()


def import_module(folder: Path) -> None:
    (folder / "evil.py").write_text("x = 1")
    spec = importlib.util.spec_from_file_location("evil", folder / "evil.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


HARM: dict[str, Callable[[Path, Path], object]] = {
    "a shell": lambda here, there: os.system("true"),
    "a program": lambda here, there: subprocess.run([sys.executable, "-V"], check=False),
    "a pickle": lambda here, there: pickle.loads(pickle.dumps(Call())),
    "a module": lambda here, there: import_module(here),
    "the network": lambda here, there: socket.create_connection(("127.0.0.1", 9), 0.1),
    "a file": lambda here, there: (there / "file").write_text("x"),
    "a file more": lambda here, there: (there / "more").touch(),
    "a link": lambda here, there: (there / "link").symlink_to(here),
    "through a link": lambda here, there: (here / "link").write_text("x"),
    "upwards": lambda here, there: Path("link", "..", there.name, "file").write_text("x"),
    "a folder": lambda here, there: (there / "folder").mkdir(),
    "gone": lambda here, there: (there / "file").unlink(),
    "moved here": lambda here, there: (there / "file").rename(here / "file"),
    "moved there": lambda here, there: (here / "mine").rename(there / "mine"),
    "all gone": lambda here, there: shutil.rmtree(there),
}


@pytest.mark.parametrize("way", HARM)
@pytest.mark.parametrize("ending", ["quietly", "refused"])
def test_forbidden_side_effects_are_blocked_and_reported(
    tmp_path: Path, way: str, ending: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")

    def judge() -> None:
        with scratch_folder() as here:
            (here / "mine").touch()
            (here / "link").symlink_to(tmp_path / "there" / "file")
            try:
                HARM[way](here, tmp_path / "there")
            except OSError:
                if ending == "refused":
                    raise SparsegradError("no", where="x") from None

    tally: Counter[str] = Counter()
    with pytest.raises(AssertionError):
        hostility._try(judge, {}, tally)
    assert tally == {"cases": 1, "tracebacks": 1}
    assert hostility.folder_content(tmp_path) == {"there": "folder", "there/file": b"precious"}


def test_writes_beside_the_working_folder_are_detected() -> None:
    with pytest.raises(AssertionError), scratch_folder() as here:
        (here.parent / "x").touch()


def test_harmless_actions_are_allowed(tmp_path: Path) -> None:
    def judge() -> None:
        with scratch_folder() as here, tempfile.TemporaryDirectory() as other:
            (here / "a").mkdir()
            (here / "a" / "b").write_text("x")
            (here / "link").symlink_to(tmp_path)
            (here / "link").unlink()
            shutil.move(here / "a", Path(other) / "a")
            with Path(os.devnull).open("w") as nothing:
                nothing.write("x")
            tmp_path.joinpath("read").exists()

    tally: Counter[str] = Counter()
    hostility._try(judge, {}, tally)
    assert tally == {"cases": 1, "accepted": 1}


@pytest.mark.parametrize("way", ["runs", "waits"])
def test_endless_case_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(hostility, "_HANGS_S", 0.1)
    monkeypatch.setattr(hostility, "_WAITS_S", 0.1 if way == "waits" else 600)
    os.mkfifo(tmp_path / "pipe")

    def judge() -> None:
        if way == "waits":
            (tmp_path / "pipe").read_bytes()
        while True:
            pass

    with pytest.raises(hostility.CaseTimeout, match="still"):
        hostility._try(judge, {}, Counter())


def test_error_without_a_location_fails() -> None:
    def judge() -> None:
        raise SparsegradError("no")

    with pytest.raises(AssertionError):
        hostility._try(judge, {}, Counter())


def test_summary_table_counts_a_property_once() -> None:
    def report(*tried: object) -> SimpleNamespace:
        return SimpleNamespace(user_properties=[(PROPERTY, list(tried)), ("other", 3)])

    few, many = report("b", 30, 10, 20, 0), report("b", 1400, 400, 1000, 0)
    lines = summary_table([many, SimpleNamespace(), few, report("a", 2, 0, 1, 1)])
    assert lines[2:5] == [
        "| a | 2 | 0 | 1 | 1 |",
        "| b | 1,400 | 400 | 1,000 | 0 |",
        "| all | 1,402 | 400 | 1,001 | 1 |",
    ]
    assert summary_table([SimpleNamespace()]) == []
