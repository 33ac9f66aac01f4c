"""A checkpoint's manifest.json: what belongs to it, byte by byte, and whose it is. No torch.

Written last, so that a checkpoint without it is not whole::

    {"format": 1, "recipe": "<digest>", "processes": 1,
     "versions": {"sparsegrad": "0.1.0", "torch": "2.13.0"},
     "files": {"trainable.safetensors": {"bytes": 1234, "sha256": "<hex>"}, ...},
     "check": "<sha256 of all of the above>"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.records.environment import package_versions
from sparsegrad_cli.report.access import block

MANIFEST = "manifest.json"
FORMAT = 1
_VERSIONS = ("sparsegrad", "torch", "transformers")


def seal(folder: Path, recipe: str) -> None:
    """Write the manifest of all files in a folder.

    Args:
        recipe: digest of the recipe that the checkpoint belongs to.
    """
    versions = package_versions()
    content = {
        "format": FORMAT,
        "recipe": recipe,
        "processes": distributed.world_size(),
        "versions": {name: versions[name] for name in _VERSIONS},
        "files": {path.name: _about(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(checked(content), indent=1), encoding="utf-8")


def checked(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a digest of itself."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "check": hashlib.sha256(text.encode()).hexdigest()}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is as it was written.

    A checkpoint of another format is not judged: :func:`check_ours` refuses it.
    """
    try:
        manifest = _read(folder)
        if manifest["format"] != FORMAT:
            return None
        files = dict(manifest["files"])
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes of {wanted['bytes']}"
            if _about(path) != wanted:
                return f"the checksum of {name} does not fit"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished, or an older version wrote it"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None if files else f"{MANIFEST} names no files"


def check_ours(folder: Path, recipes: Collection[str]) -> list[str]:
    """Refuse a checkpoint of another format or recipe.

    Args:
        recipes: digests of the run's recipe, and of the recipe before the run was extended.

    Returns:
        Notes: packages that were others then, so that what follows may differ in the last bits.

    Raises:
        FileFormatError: another version of sparsegrad wrote it, in a way this one does not read.
        UsageError: it belongs to another recipe, or to another number of processes.
    """
    manifest = _read(folder)
    then = block(manifest, "versions")
    if manifest["format"] != FORMAT:
        raise FileFormatError(
            f"{folder.name} has format {manifest['format']!r:.40}, written by sparsegrad "
            f"{then.get('sparsegrad')!s:.40}; this version reads format {FORMAT}",
            where=str(folder),
            fix="go on with the version that wrote it; --overwrite begins anew",
        )
    if manifest.get("recipe") not in recipes:
        raise UsageError(
            f"{folder.name} belongs to another recipe",
            where=str(folder),
            fix="take the folder away: the checkpoint before is used, or training begins anew",
        )
    processes = manifest.get("processes")
    if processes != distributed.world_size():
        raise UsageError(
            f"{folder.name} was written by a run in {processes!s:.40} "
            f"process{'' if processes == 1 else 'es'}, this is one in {distributed.world_size()}: "
            "its steps would be others",
            where=str(folder),
            fix=f"start it in {processes}; --overwrite begins anew",
        )
    now = package_versions()
    differ = [name for name in _VERSIONS if then.get(name) != now[name]]
    changed = [f"{name} {then.get(name)!s:.40} then, {now[name]} now" for name in differ]
    if not changed:
        return []
    return [f"{folder.name} was written by other versions ({'; '.join(changed)})"]


def _read(folder: Path) -> dict[str, Any]:
    """The manifest (OSError; ValueError and its kin where it is damaged)."""
    content: dict[str, Any] = plain_json((folder / MANIFEST).read_bytes())
    check = content.pop("check")
    if check != checked(content)["check"]:
        raise ValueError("the manifest does not fit its own digest")
    return content


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}
