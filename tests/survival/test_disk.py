"""Full disks, read-only folders and a clock that goes backwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPO
from support.survival_runs import Workspace, flat, largest_file, record, weights

from sparsegrad_cli.run.checkpoints import last_checkpoint

# A private mount in a user namespace, which disappears with the process.
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def own_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", "1m", "/mnt", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not own_mount(), reason="needs user name spaces (unshare -rm)")


@pytest.mark.parametrize("method", ["full", pytest.param("core static", marks=pytest.mark.slow)])
def test_full_disk_keeps_the_last_checkpoint_and_the_run_resumes(
    workspace: Workspace, method: str
) -> None:
    """A limit on file size makes the second checkpoint fail."""
    whole, run = workspace.uninterrupted_run(method), workspace.new_run()
    assert workspace.train(method, run, point="checkpoint-renamed").code == -9
    left = last_checkpoint(run)
    assert left is not None and left.name == "checkpoint-2"
    small = largest_file(left) // 2048  # KiB: half the size of a checkpoint
    ended = workspace.train(method, run, "--resume", point="small-files", count=max(2, small))
    assert ended.code == 1 and "could not be written" in flat(ended)
    assert "Traceback" not in ended.err
    assert last_checkpoint(run) == left and record(run)["status"] in ("failed", "running")
    assert not list(run.glob("*.partial"))
    ended = workspace.train(method, run, "--resume")
    assert ended.code == 0 and weights(run) == weights(whole)


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.run.folder import lock_folder, prepare_folder
recipe = load_recipe("quickstart").recipe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
run = Path(sys.argv[1])
try:
    with lock_folder(run):
        prepare_folder(run, recipe, resume=False, overwrite=False)
except DiskError as error:
    print(error.what)
print(run.exists())
"""


def test_full_disk_at_the_start_is_reported_and_the_folder_unchanged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said == ["recipe.yaml could not be written: File too large", "False"]


FULL = """
import errno, os, sys
from pathlib import Path
os.environ["COLUMNS"] = "200"
import torch
from torch import nn
from sparsegrad_cli.errors import DiskError
from support.checkpoint_files import save
from sparsegrad_cli.run.checkpoints import Checkpoints, last_checkpoint

run = Path(sys.argv[1]) / "run"
run.mkdir()
model = nn.Linear(128, 128)
optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
model(torch.ones(1, 128)).sum().backward()
optimizer.step()
state = {n: p.detach() for n, p in model.named_parameters()}
def fill(folder):
    save(folder, state, optimizer, schedule)
shelf = Checkpoints(run, "recipe", limit=1)
written = []
for step in range(1, 20):  # 210 kB each; the limit keeps one, a second must fit beside it
    try:
        shelf.write(step, fill, None)
        written.append(step)
        if step == 3:
            (run / "somebody-elses").write_bytes(bytes(350_000))
    except DiskError as error:
        assert isinstance(error.__cause__, Exception)
        print("refused", step, "No space left" in error.what, sorted(p.name for p in run.iterdir()))
        print("whole", last_checkpoint(run).name)
        (run / "somebody-elses").unlink(missing_ok=True)
print("written", written[-1])
"""


@needs_mount
def test_full_tmpfs(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    inner = [sys.executable, "-c", FULL, str(place)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT, "sh", "700k", str(place), *inner],
        env=os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "refused 4 True ['checkpoint-3', 'somebody-elses']",
        "whole checkpoint-3",
        "written 19",
    ]


READ_ONLY = """
import sys
from sparsegrad_cli.cli.app import app
from sparsegrad_cli.cli.output import run_guarded
place = sys.argv[1]
for flags in (("run", "--resume"), ("run", "--overwrite"), ("new",)):
    sys.argv = ["sparsegrad", "train", "method=full", "-q", "-o", f"{place}/{flags[0]}", *flags[1:]]
    print(run_guarded(app), "torch" in sys.modules)
"""
MOUNT_READ_ONLY = (
    'mount -t tmpfs tmpfs "$1" && mkdir "$1/run" && touch "$1/run/recipe.yaml" && '
    'mount -o remount,ro "$1" && exec "$2" -c "$3" "$1"'
)


@needs_mount
def test_read_only_folder_is_refused_before_loading(tmp_path: Path) -> None:
    arguments = [str(tmp_path), sys.executable, READ_ONLY]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNT_READ_ONLY, "sh", *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == 3 * ["1 False"], done.stderr
    assert done.stderr.count("Read-only file system") == 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_file_in_place_of_the_folder_is_refused(
    workspace: Workspace, tmp_path: Path, flags: tuple[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for place, code in ((tmp_path / "file", 2), (tmp_path / "file" / "run", 1)):
        ended = workspace.train("full", place, *flags)
        assert ended.code == code and str(tmp_path / "file") in flat(ended)
    assert (tmp_path / "file").read_text() == "precious"


def test_clock_going_backwards_changes_nothing(workspace: Workspace) -> None:
    """The clock goes back an hour at every reading, also across a kill and a resume."""
    run = workspace.new_run()
    assert workspace.train("lora", run, point="checkpoint-renamed", count=2).code == -9
    ended = workspace.train("lora", run, "--resume", point="clock-back", count=1)
    assert ended.code == 0, ended.err
    mine, theirs = record(run), record(workspace.uninterrupted_run("lora"))
    assert weights(run) == weights(workspace.uninterrupted_run("lora"))
    assert mine["metrics"] == theirs["metrics"] and mine["resumed_from"] == 4
    assert mine["finished"] < mine["started"]  # the clock did go backwards
    assert all(value >= 0 for value in mine["time"].values())
    assert json.loads((run / "run.json").read_text())["status"] == "done"
