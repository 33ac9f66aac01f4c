"""Where a run ran: machine, versions, git state, resident memory. No torch at import."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "sparsegrad",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
)
GIT_TIMEOUT_S = 5.0


def collect(device: str | None = None) -> dict[str, Any]:
    """The ``environment`` block of run.json. Imports torch, if nobody has yet.

    Args:
        device: the run's device (``cpu``, ``cuda:0``); by default the accelerator if there is one.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = None
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that a result can depend on; None: not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def cpu_model() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def git_state(folder: str | Path) -> dict[str, Any]:
    """Commit of the checkout that holds ``folder``, and whether tracked files differ from it.

    Both are None when the folder is in no checkout, git is missing or does not answer. A checkout
    without a commit yet has commit None.
    """
    # Untracked files do not count: a run's own output would make every checkout dirty.
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if changes is None:
        return {"commit": None, "dirty": None}
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    return {"commit": commit or None, "dirty": bool(changes)}


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What git prints, stripped; None when it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=False,
            # Reading must not lock the index under somebody's own git command.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most resident memory this process has had since it started, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # Linux counts KiB
