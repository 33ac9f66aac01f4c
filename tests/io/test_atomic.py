"""Files and folders are written completely or not at all, whatever fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import REPO
from torch import nn

from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.io.atomic import (
    put_back,
    read_tensors,
    remove_folder,
    save_tensors,
    write_folder,
)
from sparsegrad_cli.run.checkpoint_state import read_state


def fill_with(text: str) -> Any:
    def fill(folder: Path) -> None:
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)

    return fill


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_folder_is_written_and_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    (folder / "extra").write_text("old")
    write_folder(folder, fill_with("b"))
    assert names(folder) == ["one", "two"]
    assert (folder / "one").read_text() == "b"
    assert names(tmp_path / "run") == ["checkpoint-1"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-1.partial"
    stale.mkdir()
    (stale / "junk").write_text("x")
    write_folder(tmp_path / "checkpoint-1", fill_with("a"))
    assert names(tmp_path) == ["checkpoint-1"]
    assert names(tmp_path / "checkpoint-1") == ["one", "two"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), DiskError),
        (ValueError("a bug"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_failed_write_keeps_the_previous_folder_only(
    tmp_path: Path, error: BaseException, raised: type[BaseException], before: bool
) -> None:
    folder = tmp_path / "checkpoint-1"
    if before:
        write_folder(folder, fill_with("a"))

    def fill(partial: Path) -> None:
        (partial / "one").write_text("b")
        raise error

    with pytest.raises(raised) as caught:
        write_folder(folder, fill)
    assert names(tmp_path) == (["checkpoint-1"] if before else [])
    if before:
        assert names(folder) == ["one", "two"]
        assert (folder / "one").read_text() == "a"
    if isinstance(caught.value, DiskError):
        assert "No space left" in caught.value.what
        assert caught.value.where == str(folder)
        assert caught.value.fix == "free some space"


def test_failed_rename_restores_the_previous_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError("Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DiskError):
        write_folder(folder, fill_with("b"))
    assert names(tmp_path) == ["checkpoint-1"]
    assert (folder / "one").read_text() == "a"


def test_unwritable_path_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError):
        write_folder(tmp_path / "file" / "checkpoint-1", fill_with("a"))
    with pytest.raises(DiskError):
        save_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_save_tensors_round_trip_of_views_and_gradients(tmp_path: Path) -> None:
    tensors = {
        "view": torch.arange(6.0).reshape(2, 3).T,
        "parameter": nn.Parameter(torch.ones(2)),
        "number": torch.tensor(3.0),
        "positions": torch.tensor([1, 5], dtype=torch.int32),
        "empty": torch.empty(0),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    path = tmp_path / "deep" / "a.safetensors"
    save_tensors(path, tensors, {"method": "full"})
    got = read_tensors(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor.detach())
    assert names(path.parent) == ["a.safetensors"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from sparsegrad_cli.errors import DiskError
from support.checkpoint_files import save
from sparsegrad_cli.io.atomic import save_tensors, write_folder

run = Path(sys.argv[1])
model = nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 256)).sum().backward()
optimizer.step()
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
state = {n: p.detach() for n, p in model.named_parameters()}
fill = lambda folder: save(folder, state, optimizer, schedule)
write_folder(run / "checkpoint-1", fill)
save_tensors(run / "adapter.safetensors", state, {})
for limit in (300_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, 300_000))
    for name, write in (
        ("checkpoint-2", lambda p: write_folder(p, fill)),
        ("checkpoint-1", lambda p: write_folder(p, fill)),
        ("adapter.safetensors", lambda p: save_tensors(p, state, {})),
    ):
        try:
            write(run / name)
        except DiskError as error:
            assert error.where == str(run / name)
            print("refused", name)
        else:
            print("written", name)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file size limits")
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Files above a size limit cannot be written: 263 kB of weights, 526 kB of optimizer state."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "refused checkpoint-2",
        "refused checkpoint-1",
        "written adapter.safetensors",
        "refused checkpoint-2",
        "refused checkpoint-1",
        "refused adapter.safetensors",
    ]
    assert names(tmp_path) == ["adapter.safetensors", "checkpoint-1"]
    survivor = tmp_path / "checkpoint-1"
    assert read_tensors(survivor / "trainable.safetensors")["weight"].shape == (256, 256)
    assert len(read_tensors(survivor / "optimizer.safetensors")) == 6
    assert read_state(survivor).optimizer_groups[0]["lr"] == 1e-3 / 3
    assert read_tensors(tmp_path / "adapter.safetensors")["weight"].shape == (256, 256)


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("plain", "x.safetensors")]
    assert modes[0] == modes[1]
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "x.safetensors"}


# --- what a kill between two steps of it leaves


def test_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    folder.replace(tmp_path / "checkpoint-1.before")  # and the process is killed here
    put_back(folder)
    assert names(tmp_path) == ["checkpoint-1"]
    put_back(folder)
    assert (folder / "one").read_text() == "a"


def test_previous_folder_survives_a_second_failed_write(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    folder.replace(tmp_path / "checkpoint-1.before")

    def fill(partial: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError):
        write_folder(folder, fill)
    assert names(tmp_path) == ["checkpoint-1"] and (folder / "one").read_text() == "a"


def test_previous_folder_is_removed_once_there_is_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    write_folder(tmp_path / "other", fill_with("old"))
    (tmp_path / "other").replace(tmp_path / "checkpoint-1.before")
    write_folder(folder, fill_with("b"))
    assert names(tmp_path) == ["checkpoint-1"] and (folder / "one").read_text() == "b"


def test_removing_a_folder_never_leaves_half_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    write_folder(folder, fill_with("a"))
    (tmp_path / "checkpoint-1.removed").mkdir()  # of a removal that was killed
    remove_folder(folder)
    assert names(tmp_path) == []
    remove_folder(folder)


ORDER = """
import os, sys
from pathlib import Path
events = []
for name in ("fsync", "replace", "rename"):
    def watched(*args, real=getattr(os, name), name=name):
        target = args[-1] if name != "fsync" else os.readlink(f"/proc/self/fd/{args[0]}")
        events.append((name, Path(target).name))
        return real(*args)
    setattr(os, name, watched)
from sparsegrad_cli.io.atomic import write_folder
def fill(folder):
    (folder / "one").write_text("1")
    (folder / "two").write_text("2")
write_folder(Path(sys.argv[1]) / "checkpoint-1", fill)
for event in events:
    print(*event)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_bytes_are_synced_before_the_rename(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORDER, str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "fsync one",
        "fsync two",
        "fsync checkpoint-1.partial",
        "replace checkpoint-1",
        f"fsync {tmp_path.name}",
    ]
