"""Describe where a run ran: machine, versions, git state, resident memory. No torch at import."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import psutil

from sparsegrad_cli.records.run import EnvironmentBlock, GitBlock

PACKAGES = (
    "sparsegrad",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
)
GIT_TIMEOUT_S = 5.0


def collect(device: str | None = None) -> EnvironmentBlock:
    """Return the machine and the software. Imports torch.

    Args:
        device: The run's device (``cpu``, ``cuda:0``); by default CUDA if this machine has it.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = None
    if device.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    return EnvironmentBlock(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_model(),
        device=device,
        device_name=name,
        threads=torch.get_num_threads(),
        packages=package_versions(),
    )


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Return the version of each package; None: not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def cpu_model() -> str:
    """Return the name of the processor, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def git_state(folder: str | Path) -> GitBlock:
    """Return the commit of the checkout around a folder, and whether tracked files differ from it.

    Both are None if the folder is not in a checkout, or git is missing or does not answer.
    """
    # Untracked files do not count: a run's own output would make every checkout dirty.
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if changes is None:
        return GitBlock(commit=None, dirty=None)
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    return GitBlock(commit=commit or None, dirty=bool(changes))


def _git(folder: str | Path, *arguments: str) -> str | None:
    """Return what git prints, stripped; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=False,
            # Reading must not lock the index while the user runs git.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def rss_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)
