"""Write files and folders so that each is on disk whole or not at all.

Everything is written under a temporary name, synced to disk and renamed into place. A kill, a full
disk or a power cut leaves the previous content or the new one. At most a file or folder with a
temporary name is left beside it, which no reader opens and which the next write removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.errors import DiskError, FileFormatError
from sparsegrad_cli.io.paths import discard, make_folder

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL, BEFORE, REMOVED = ".partial", ".before", ".removed"


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text; what UTF-8 cannot encode becomes a question mark.

    Raises:
        DiskError: The file cannot be written; the previous content is untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        # Not mkstemp: its files have mode 0600, and the umask cannot be read without a race.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode("utf-8", "replace"))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise DiskError(
            f"{target.name} could not be written: {error.strerror or error}",
            where=str(target),
            fix="free some space or check the permissions; the previous file is kept",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # After the rename it is gone.
            temporary.unlink()


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes ``path`` when the context ends well.

    Raises:
        DiskError: The file cannot be written; the previous content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise DiskError(
            f"{path.name} could not be written: {error.strerror or error}",
            where=str(path),
            fix="free some space or check the permissions; the previous file is kept",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # After the rename it is gone.
            temporary.unlink()


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Write JSON values, mappings and sequences; NaN and infinities are written as null.

    Raises:
        DiskError: The file cannot be written; the previous content is untouched.
    """
    text = json.dumps(without_nan(data), indent=1, allow_nan=False, ensure_ascii=True)
    write_text_atomic(path, text + "\n")


def without_nan(data: Any) -> Any:
    """Return JSON values with every NaN and infinity replaced by None: JSON does not have them."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return data


def torn_writes(path: str | Path) -> list[Path]:
    """Return the temporary files of a text file, which is being written or whose writer died."""
    target = Path(path)
    return list(target.parent.glob(f".{target.name}.*.tmp"))


def write_folder(
    folder: Path,
    fill: Callable[[Path], None],
    *,
    fix: str = "free some space",
    stem: Path | None = None,
) -> None:
    """Fill a new folder under a temporary name, then rename it into place.

    Args:
        folder: Its place; a folder that stands there is replaced.
        fill: Writes the content into the folder that it is given.
        fix: What the error advises.
        stem: The path that the temporary names begin with; ``folder`` by default. What has such a
            name is removed, so outside of our own folders it must be a name that no user gives.

    Raises:
        DiskError: Something cannot be written. No partial folder is left, and a folder that stood
            there before is untouched.
    """
    from safetensors import SafetensorError

    partial, before = beside(stem or folder, PARTIAL), beside(stem or folder, BEFORE)
    try:
        put_back(folder, stem)
        discard(partial)
        make_folder(partial.parent)
        partial.mkdir()
        fill(partial)
        sync_tree(partial)
        if folder.exists():  # Moved aside, so that a failing rename does not lose it.
            discard(before)
            folder.replace(before)
        try:
            partial.replace(folder)
        except BaseException:
            put_back(folder, stem)
            raise
        sync_folder(folder.parent)
        discard(before)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"{folder.name} could not be written: {_reason(error)}", where=str(folder), fix=fix
        ) from error
    finally:
        discard(partial)  # After the rename it is gone.


def _reason(error: Exception) -> str:
    """Return an error's reason without its number and the temporary name that it quotes."""
    return getattr(error, "strerror", None) or str(error)


def beside(path: Path, ending: str) -> Path:
    """Return the temporary name of a file or folder with one of the endings."""
    return path.with_name(path.name + ending)


def put_back(folder: Path, stem: Path | None = None) -> None:
    """Undo a replacement that was cut between its two renames; see :func:`write_folder`."""
    before = beside(stem or folder, BEFORE)
    if before.exists() and not folder.exists():
        before.replace(folder)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it, so that no half of it ever has its name."""
    removed = beside(folder, REMOVED)
    with contextlib.suppress(OSError):
        discard(removed)
        folder.replace(removed)
        discard(removed)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically, from tensors on any device.

    Raises:
        DiskError: The file cannot be written; the previous content is untouched.
    """
    from safetensors import SafetensorError

    partial = beside(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(ready, partial, metadata)
        _sync(partial)
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DiskError(
            f"{path.name} could not be written: {_reason(error)}",
            where=str(path),
            fix="free some space or check the permissions",
        ) from error


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, not atomically, with the mode that the umask gives.

    safetensors itself gives its files mode 0600.
    """
    from safetensors.torch import save_file

    like = beside(path, ".mode")
    for left in (like, path):
        left.unlink(missing_ok=True)  # A link of that name would be written through.
    like.touch()
    mode = like.stat().st_mode & 0o777
    like.unlink()
    save_file(tensors, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        FileFormatError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise FileFormatError(
            f"cannot be read: {error}",
            where=str(path),
            fix="restore it from a copy, or move it aside: --resume then uses an older checkpoint",
        ) from error
    return tensors


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below a folder to disk, and the folder itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, where the file system supports that."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    """Sync a file's bytes to disk; a full disk may refuse them only here, with an OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Such a file cannot be synced.
            raise
    finally:
        os.close(descriptor)
