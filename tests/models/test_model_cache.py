"""A built-in model's folder in the cache is made once, and is whole or not there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparsegrad_cli.errors import DiskError, FileFormatError
from sparsegrad_cli.models.model_cache import cache_folder, cached_model

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def test_it_is_made_once(cache: Path) -> None:
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        write_config(folder)

    for _ in range(2):
        assert cached_model("tiny", fill, megabytes=1) == cache / "tiny"
    assert len(calls) == 1 and has_config(cache / "tiny")
    assert list(cache.iterdir()) == [cache / "tiny"]


def test_threads_wait_for_the_one_that_makes_it(cache: Path) -> None:
    calls: list[Path] = []
    found: list[bool] = []
    gate = threading.Barrier(3)

    def fill(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.1)
        write_config(folder)

    def work() -> None:
        gate.wait()
        found.append(has_config(cached_model("tiny", fill, megabytes=1)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3 and len(calls) == 1


def test_processes_wait_for_the_one_that_makes_it(cache: Path) -> None:
    program = """
import time
from sparsegrad_cli.models.model_cache import cached_model
def fill(folder):
    print("made", flush=True)
    time.sleep(2)
    (folder / "config.json").write_text("{}")
found = cached_model("tiny", fill, megabytes=1)
assert (found / "config.json").is_file()
"""
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert sorted(process.communicate()[0] for process in started) == ["", "made\n"]
    assert [process.returncode for process in started] == [0, 0]
    assert list(cache.iterdir()) == [cache / "tiny"]


def test_a_folder_that_is_not_whole_is_made_again(cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "old").write_text("left")
    folder = cached_model("tiny", write_config, megabytes=1, is_whole=has_config)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FileFormatError("damaged")])
def test_an_interrupted_or_failed_attempt_leaves_nothing(cache: Path, error: BaseException) -> None:
    def die(folder: Path) -> None:
        write_config(folder)
        raise error

    with pytest.raises(type(error)):
        cached_model("tiny", die, megabytes=1)
    assert list(cache.iterdir()) == []
    # A killed process leaves its temporary folder, which the next attempt does not use.
    (cache / "tiny.partial").mkdir()
    (cache / "tiny.partial" / "half").write_text("left")
    folder = cached_model("tiny", write_config, megabytes=1)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEGRAD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError) as caught:
        cached_model("tiny", write_config, megabytes=7)
    assert caught.value.fix == "free 7 MB there, or set SPARSEGRAD_CACHE to a folder with room"


@pytest.mark.parametrize("place", ["lock", "fill"])
def test_advice_is_on_the_cache_wherever_writing_fails(cache: Path, place: str) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    cache.mkdir()
    if place == "lock":
        (cache / ".lock").symlink_to(cache / "elsewhere")
    with pytest.raises(DiskError) as caught:
        cached_model("tiny", full, megabytes=7)
    assert "SPARSEGRAD_CACHE" in str(caught.value.fix)
    assert ("No space left" in caught.value.what) == (place == "fill")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSEGRAD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sparsegrad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sparsegrad"
    monkeypatch.setenv("SPARSEGRAD_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
