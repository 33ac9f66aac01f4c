"""Write, check and remove the checkpoint folders of a run. Imports no torch.

A checkpoint's manifest.json names every file with its size and digest. It is written last::

    {"format": 1, "recipe": "<digest>", "processes": 1,
     "versions": {"sparsegrad": "0.1.0", "torch": "2.13.0"},
     "files": {"trainable.safetensors": {"bytes": 1234, "sha256": "<hex>"}, ...},
     "check": "<sha256 of all of the above>"}

The newest checkpoint is the one with the highest step, whatever its time stamp.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import DiskError, FileFormatError, UsageError
from sparsegrad_cli.io.atomic import BEFORE, PARTIAL, REMOVED, put_back, remove_folder, write_folder
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import discard
from sparsegrad_cli.records.environment import package_versions
from sparsegrad_cli.run.checkpoint_state import read_state

MANIFEST = "manifest.json"
TRAINABLE = "trainable.safetensors"  # The trained parameters.
FORMAT = 1
_VERSIONS = ("sparsegrad", "torch", "transformers")
_PREFIX = "checkpoint-"
_NAME = re.compile(_PREFIX + "([0-9]{1,18})")


# --- folders


def checkpoints(run_dir: Path) -> list[Path]:
    """Return all folders with the name of a checkpoint, complete or not, by step."""
    found = [path for path in run_dir.glob(f"{_PREFIX}*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(folder: Path) -> int | None:
    """Return N of checkpoint-N; None for any other folder."""
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name and folder.is_dir() else None


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; None without one."""
    return next((path for path in reversed(checkpoints(run_dir)) if damage(path) is None), None)


def best_of(folder: Path) -> Path | None:
    """Return the checkpoint that was the best one when this one was written; None without one.

    Raises:
        FileFormatError: state.json of the checkpoint cannot be read.
    """
    best = read_state(folder).progress.best_step
    return None if best is None else folder.with_name(f"{_PREFIX}{best}")


# --- manifests


def seal(folder: Path, recipe: str) -> None:
    """Write the manifest of all files in a folder.

    Args:
        folder: Holds every other file of the checkpoint.
        recipe: Digest of the recipe that the checkpoint belongs to.
    """
    versions = package_versions()
    content = {
        "format": FORMAT,
        "recipe": recipe,
        "processes": distributed.world_size(),
        "versions": {name: versions[name] for name in _VERSIONS},
        "files": {path.name: _size_and_digest(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(with_check(content), indent=1), encoding="utf-8")


def with_check(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with a digest of itself."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "check": hashlib.sha256(text.encode()).hexdigest()}


def damage(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file is as it was written.

    A manifest of another format is not checked: :func:`check_ours` refuses it.
    """
    try:
        manifest = _read_manifest(folder)
        if manifest["format"] != FORMAT:
            return None
        files = dict(manifest["files"])
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if _size_and_digest(path) != expected:
                return f"the checksum of {name} does not match"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished, or an older version wrote it"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None if files else f"{MANIFEST} names no files"


def check_ours(folder: Path, recipes: Collection[str]) -> list[str]:
    """Refuse a checkpoint of another format, recipe or number of processes.

    Args:
        folder: An undamaged checkpoint.
        recipes: Digests of the run's recipe, and of its recipes before it was extended.

    Returns:
        Notes on packages whose version has changed. Later steps may then differ in the last bits.

    Raises:
        FileFormatError: Another version of sparsegrad wrote it, in a format that this version does
            not read.
        UsageError: It belongs to another recipe, or to another number of processes.
    """
    manifest = _read_manifest(folder)
    versions = manifest.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    if manifest["format"] != FORMAT:
        raise FileFormatError(
            f"{folder.name} has format {manifest['format']!r:.40}, written by sparsegrad "
            f"{versions.get('sparsegrad')!s:.40}; this version reads format {FORMAT}",
            where=str(folder),
            fix="resume with the version that wrote it, or start again with --overwrite",
        )
    if manifest.get("recipe") not in recipes:
        raise UsageError(
            f"{folder.name} belongs to another recipe",
            where=str(folder),
            fix="remove the folder: --resume continues from the checkpoint before, or starts again",
        )
    processes = manifest.get("processes")
    if processes != distributed.world_size():
        raise UsageError(
            f"{folder.name} was written by a run in {processes!s:.40} "
            f"process{'' if processes == 1 else 'es'}, and this run has "
            f"{distributed.world_size()}: its steps would be others",
            where=str(folder),
            fix=f"start {processes} processes, or start again with --overwrite",
        )
    now = package_versions()
    changed = [
        f"{name} {versions.get(name)!s:.40} then, {now[name]} now"
        for name in _VERSIONS
        if versions.get(name) != now[name]
    ]
    if not changed:
        return []
    return [f"{folder.name} was written by other versions ({'; '.join(changed)})"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check its own digest.

    Raises:
        OSError: It cannot be read.
        ValueError, KeyError, TypeError, AttributeError: It is damaged.
    """
    content: dict[str, Any] = plain_json((folder / MANIFEST).read_bytes())
    check = content.pop("check")
    if check != with_check(content)["check"]:
        raise ValueError("the manifest does not match its own digest")
    return content


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


# --- the checkpoints of one run


class Checkpoints:
    """The checkpoints of one run, which no other run writes to.

    Args:
        run_dir: The run's folder.
        recipe: Digest of the run's recipe.
        limit: Maximum number of checkpoints to keep; None keeps all. The newest and the best are
            always kept.
        keep_best: The run ends with its best checkpoint, so other checkpoints are useless without
            it.
        earlier: Digests of the recipes before the run was extended.

    Attributes:
        newest: The complete checkpoint that was found or written last.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: str,
        *,
        limit: int | None,
        keep_best: bool = False,
        earlier: Collection[str] = (),
    ) -> None:
        self.run_dir, self._recipe, self._earlier = run_dir, recipe, tuple(earlier)
        self._limit, self._keep_best = limit, keep_best
        self._useless: set[Path] = set()
        self.newest: Path | None = None

    def find(self, note: Callable[[str], None]) -> Path | None:
        """Remove what a killed write left, and find the newest checkpoint to resume from.

        Args:
            note: Called with each checkpoint that is skipped, and the reason.

        Raises:
            FileFormatError: A checkpoint has the format of another version.
            UsageError: A checkpoint belongs to another recipe.
        """
        self._clear_temporary()
        for folder in reversed(checkpoints(self.run_dir)):
            wrong = damage(folder)
            if wrong is None:
                for text in check_ours(folder, (self._recipe, *self._earlier)):
                    note(text)
                wrong = self._damage_of_best(folder)
            if wrong is None:
                if self._useless:
                    note(f"{folder.name} is used, the newest whole checkpoint")
                self.newest = folder
                return folder
            note(f"{folder.name} is damaged: {wrong}")
            self._useless.add(folder)
        if self._useless:
            note("no whole checkpoint is left: training starts again")
        return None

    def _damage_of_best(self, folder: Path) -> str | None:
        best = best_of(folder) if self._keep_best else None
        if best is None or best == folder:
            return None
        wrong = damage(best)
        return f"its best checkpoint, {best.name}: {wrong}" if wrong else None

    def _clear_temporary(self) -> None:
        for before in self.run_dir.glob(f"{_PREFIX}*{BEFORE}"):
            put_back(before.with_name(before.name.removesuffix(BEFORE)))
        for ending in (PARTIAL, BEFORE, REMOVED):
            for left in self.run_dir.glob(f"{_PREFIX}*{ending}"):
                discard(left)

    def write(self, step: int, fill: Callable[[Path], None], best: Path | None) -> Path:
        """Write checkpoint-``step``, read it back, and then remove those over the limit.

        Args:
            step: The optimizer step.
            fill: Writes the checkpoint's files into the given folder.
            best: The best checkpoint so far, which may be this one.

        Raises:
            DiskError: It cannot be written or reads back differently. All others are unchanged.
        """
        folder = self.place(step)

        def fill_and_seal(partial: Path) -> None:
            fill(partial)
            seal(partial, self._recipe)

        write_folder(
            folder,
            fill_and_seal,
            fix="free some space, then continue with --resume: the previous checkpoint is whole",
        )
        wrong = damage(folder)
        if wrong is not None:
            raise DiskError(
                f"{folder.name} was written and reads back differently: {wrong}",
                where=str(folder),
                fix="check the disk, then continue with --resume: the previous checkpoint is whole",
            )
        self._useless.discard(folder)
        self.newest = folder
        self._drop_over_limit(folder, best)
        return folder

    def place(self, step: int) -> Path:
        """Return the folder of checkpoint-``step``, which may not exist."""
        return self.run_dir / f"{_PREFIX}{step}"

    def _drop_over_limit(self, newest: Path, best: Path | None) -> None:
        # Later checkpoints are damaged, which is why the run resumed from an earlier one. They are
        # overwritten when the run reaches them.
        last = step_of(newest) or 0
        existing = [path for path in checkpoints(self.run_dir) if (step_of(path) or 0) <= last]
        for folder in [path for path in existing if path in self._useless]:
            remove_folder(folder)
            existing.remove(folder)
        kept = {newest, best} & set(existing)
        spare = [path for path in existing if path not in kept]
        over = len(existing) - max(self._limit, len(kept)) if self._limit is not None else 0
        for folder in spare[: max(0, over)]:
            remove_folder(folder)

    def finish(self, best: Path | None) -> None:
        """Remove damaged checkpoints at the end; with a limit of one, all but the best, too."""
        useless = {path for path in self._useless if path.is_dir()}
        if self._limit == 1 and best is not None and best.is_dir():
            useless |= set(checkpoints(self.run_dir)) - {best}
        for folder in useless:
            remove_folder(folder)
