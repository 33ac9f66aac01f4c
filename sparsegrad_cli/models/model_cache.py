"""The cache of built-in models that their packages contain in another form.

The folders are made on first use, in the first of these places:

  $SPARSEGRAD_CACHE, or $XDG_CACHE_HOME/sparsegrad, or ~/.cache/sparsegrad
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.io.atomic import write_folder
from sparsegrad_cli.io.locks import FolderLock
from sparsegrad_cli.io.paths import make_folder

_one_thread = threading.Lock()  # The lock of a folder excludes other processes only.


def cache_folder() -> Path:
    """Return the folder of the cache, which may not exist yet."""
    own = os.environ.get("SPARSEGRAD_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsegrad"


def cached_model(
    name: str,
    fill: Callable[[Path], None],
    *,
    megabytes: int,
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """Return a model's folder in the cache; make it if it is missing or not whole.

    An interrupted attempt is never used. Of several processes and threads, one makes the folder
    and the others wait for it.

    Args:
        name: Name of the folder in the cache.
        fill: Writes the model into the folder that it is given.
        megabytes: Free space that ``fill`` needs, for the error.
        is_whole: Whether a folder of that name can be used as it is.

    Raises:
        DiskError: The folder cannot be written.
    """
    folder = cache_folder() / name
    if is_whole(folder):
        return folder
    fix = f"free {megabytes} MB there, or set SPARSEGRAD_CACHE to a folder with room"
    try:
        make_folder(folder.parent)
        with _one_thread, FolderLock(folder.parent, wait_s=None):
            if not is_whole(folder):
                write_folder(folder, fill)
    except OSError as error:
        what = f"{name} could not be written: {error.strerror or error}"
        raise DiskError(what, where=str(folder), fix=fix) from error
    except DiskError as error:  # Of the lock, which advises on the folder of a run; or of `fill`.
        raise DiskError(error.what, where=error.where, fix=fix) from error
    return folder
