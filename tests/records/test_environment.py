from __future__ import annotations

import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsegrad_cli.records import environment
from sparsegrad_cli.records.run import GitBlock


def test_collect_fills_the_environment_block() -> None:
    found = environment.collect("cpu").to_json()
    assert found["python"] == platform.python_version()
    assert found["device"] == "cpu" and found["device_name"] is None
    assert found["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["packages"]) == set(environment.PACKAGES)
    assert found["cpu"] and found["platform"]
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert environment.collect().device == expected


def test_a_missing_package_has_no_version() -> None:
    versions = environment.package_versions(("psutil", "no-such-package-here"))
    assert versions["psutil"] and versions["no-such-package-here"] is None


def test_the_module_imports_no_torch() -> None:
    code = "import sys, sparsegrad_cli.records.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert environment.git_state(tmp_path) == GitBlock(commit=None, dirty=False)
    file = tmp_path / "a.txt"
    file.write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.json").write_text("{}")  # untracked: not a change
    state = environment.git_state(tmp_path / "runs")
    assert state.dirty is False and len(state.commit or "") == 40
    file.write_text("two")
    assert environment.git_state(tmp_path) == state.changed(dirty=True)


def test_git_state_outside_a_checkout_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    unknown = GitBlock(commit=None, dirty=None)
    assert environment.git_state(tmp_path) == unknown
    assert environment.git_state(tmp_path / "missing") == unknown
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert environment.git_state(Path(__file__).parent) == unknown


def test_resident_memory_grows_with_new_pages() -> None:
    before = environment.rss_bytes()
    held = mmap.mmap(-1, 64 * 2**20)  # new pages, where bytearray may get freed ones again
    held[:: 2**12] = b"x" * (64 * 2**20 // 2**12)
    assert environment.rss_bytes() - before > 32 * 2**20
