"""Files and folders that are on the disk whole, or not at all: written aside, synced, renamed.

A kill, a full disk or a power cut at any moment leaves what stood there before, or what was to
stand there; beside it at most a folder or file named ``.partial``, ``.before`` or ``.removed``,
which nobody reads and the next write takes away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsegrad_cli.errors import DiskError, FileFormatError
from sparsegrad_cli.io.paths import discard, make_folder

PARTIAL, BEFORE, REMOVED = ".partial", ".before", ".removed"

_RESUME = "free some space, then go on with --resume: the checkpoint before is whole"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder under a temporary name, then rename it into place.

    Raises:
        DiskError: something could not be written; nothing is left of the attempt, and what stood
            at ``folder`` before is untouched.
    """
    partial, before = beside(folder, PARTIAL), beside(folder, BEFORE)
    try:
        put_back(folder)
        discard(partial)
        make_folder(partial.parent)
        partial.mkdir()
        fill(partial)
        sync_tree(partial)
        if folder.exists():  # moved aside, so that a failing rename does not lose it
            discard(before)
            folder.replace(before)
        try:
            partial.replace(folder)
        except OSError:
            put_back(folder)
            raise
        sync_folder(folder.parent)
        discard(before)
    except (OSError, SafetensorError) as error:
        discard(partial)
        raise DiskError(
            f"{folder.name} could not be written: {error}",
            where=str(folder),
            fix=_RESUME,
        ) from error
    except BaseException:
        discard(partial)
        raise


def beside(path: Path, ending: str) -> Path:
    """The name under which a file or folder waits beside its place."""
    return path.with_name(path.name + ending)


def put_back(folder: Path) -> None:
    """Undo a replacement that was cut between its two renames."""
    before = beside(folder, BEFORE)
    if before.exists() and not folder.exists():
        before.replace(folder)


def remove_folder(folder: Path) -> None:
    """Remove it; however far that gets, no half of it stands under its name."""
    gone = beside(folder, REMOVED)
    with suppress(OSError):
        discard(gone)
        folder.replace(gone)
        discard(gone)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors, contiguous, from whatever device; one file, written then renamed.

    Raises:
        DiskError: it could not be written; a file that stood there before is untouched.
    """
    partial = beside(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(ready, partial, metadata)
        _sync(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DiskError(
            f"{path.name} could not be written: {error}", where=str(path), fix="free some space"
        ) from error


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """save_file, readable by whom other files in the folder are: safetensors itself makes 0600."""
    like = beside(path, ".mode")
    for there in (like, path):
        there.unlink(missing_ok=True)  # a link of that name would be written through
    like.touch()
    mode = like.stat().st_mode & 0o777
    like.unlink()
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise FileFormatError(
            f"cannot be read: {error}",
            where=str(path),
            fix="remove the damaged file or folder; an earlier checkpoint may be whole",
        ) from error


def sync_tree(folder: Path) -> None:
    """Until this returns, a power cut may take what was written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def _sync(path: Path) -> None:
    """A file's bytes on the disk: what a full one refuses late, it refuses here (OSError)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # nothing to be synced there
            raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """A folder's names on the disk, where the file system does that."""
    with suppress(OSError):
        _sync(folder)
