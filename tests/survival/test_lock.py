"""Only one process at a time holds a run folder; a killed one releases it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.folder_lock_process import lock_holder, read_process_id
from support.paths import REPO
from support.survival_runs import Workspace

from sparsegrad_cli.errors import BusyError, DiskError
from sparsegrad_cli.io.locks import FolderLock, owner_of
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.run.folder import choose_folder, lock_folder, prepare_folder


def test_locked_folder_is_refused_with_owner_and_time(workspace: Workspace) -> None:
    run = workspace.new_run()
    run.mkdir()
    with lock_holder(run) as process:
        read_process_id(process)
        for flags in ((), ("--resume",), ("--overwrite",)):
            refused = workspace.train("full", run, *flags)
            assert refused.code == 2
            said = " ".join(refused.err.replace("│", " ").split())
            assert f"is in use by process {process.pid} on {socket.gethostname()}, since 2" in said
            assert "another output_dir" in said
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert workspace.train("full", run, "train.max_steps=2").code == 0
    assert not (run / ".lock").exists()


def test_lock_ends_with_its_process_even_if_a_child_survives(tmp_path: Path) -> None:
    """Data loader workers survive a killed run for a while."""
    with lock_holder(tmp_path, "fork") as process:
        said = dict(read_process_id(process) for _ in range(2))
        with pytest.raises(BusyError, match=f"process {said['held']} on"):
            FolderLock(tmp_path)
        assert owner_of(tmp_path) is not None
        os.kill(said["held"], signal.SIGKILL)
        process.wait()
        try:
            os.kill(said["child"], 0)  # the child is alive
            assert (tmp_path / ".lock").exists()
            assert owner_of(tmp_path) is None
            with FolderLock(tmp_path):
                pass
        finally:
            os.kill(said["child"], signal.SIGKILL)


def test_process_keeps_a_lock_until_its_last_release(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        owner = json.loads(lock.path.read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()
        with FolderLock(tmp_path):
            assert owner_of(tmp_path) is None  # this process holds it
        assert lock.path.exists()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert owner_of(tmp_path) is None and owner_of(tmp_path / "nowhere") is None
    assert list(tmp_path.iterdir()) == []


def test_content_of_an_unheld_lock_file_is_ignored(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "null", '{"pid": "x"}', json.dumps({"pid": os.getppid()})):
        (tmp_path / ".lock").write_text(text)
        assert owner_of(tmp_path) is None
        with FolderLock(tmp_path):
            pass


def test_file_system_without_locks_is_noted_and_the_file_protects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    notes: list[str] = []
    with FolderLock(tmp_path, tell=notes.append):
        assert "has no file locks" in notes[0] and str(tmp_path) in notes[0]
        assert owner_of(tmp_path) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, host, busy in (
        (os.getppid(), socket.gethostname(), True),
        (ended.pid, socket.gethostname(), False),
        (ended.pid, "another", True),
    ):
        (tmp_path / ".lock").write_text(f"{pid}\n{host}\n")
        assert (owner_of(tmp_path) is not None) == busy
        if busy:
            with pytest.raises(BusyError, match=f"process {pid} on {host}"):
                FolderLock(tmp_path)
            (tmp_path / ".lock").unlink()


def test_second_owner_waits_on_request(tmp_path: Path) -> None:
    with lock_holder(tmp_path) as process:
        read_process_id(process)
        threading.Timer(0.3, process.kill).start()
        with FolderLock(tmp_path, wait_s=None) as lock:
            assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_two_unnamed_runs_get_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart", ("method=full",)).recipe
    names = [choose_folder(recipe, "train").name for _ in range(2)]
    assert names == ["acceptability-full-1", "acceptability-full-2"]


def test_refused_folder_is_unchanged(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ()).recipe
    new = tmp_path / "new"
    with pytest.raises(Exception, match="holds no run"), lock_folder(new):
        prepare_folder(new, recipe, resume=True, overwrite=False)
    assert not new.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(Exception, match="is not empty"), lock_folder(tmp_path / "full"):
        prepare_folder(tmp_path / "full", recipe, resume=False, overwrite=False)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(DiskError), lock_folder(tmp_path / "full" / "thesis.txt" / "run"):
        pass


@pytest.mark.slow
def test_only_one_of_two_simultaneous_runs_trains(workspace: Workspace) -> None:
    run = workspace.new_run()
    command = [sys.executable, "-m", "sparsegrad_cli", "train", *workspace.settings("full")]
    environment = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    both = [
        subprocess.Popen(
            [*command, "-o", str(run), "train.max_steps=2"],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], said
    refusal = said[[process.returncode for process in both].index(2)]
    refusal = " ".join(refusal.replace("│", " ").split())  # the box folds it
    assert "in use by process" in refusal or "is not empty" in refusal
    assert json.loads((run / "run.json").read_text())["status"] == "done"
