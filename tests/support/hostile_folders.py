"""Folders as nobody's program leaves them: links to anywhere, files for folders, pipes."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import strategies as st

KINDS = ("folder", "file", "pipe", "to a folder", "to a file", "to nothing", "to itself", "upwards")


def furnish(folder: Path, things: dict[str, str]) -> None:
    """Make files, folders and links; ``outside`` beside the folder is what must stay as it is."""
    outside = folder.parent / "outside"
    for path in (outside / "checkpoint-1", outside / "cells"):
        path.mkdir(parents=True)
        (path / "precious").write_text("x")
    (outside / "file").write_text("precious")
    targets = {"to a folder": outside, "to a file": outside / "file", "to nothing": outside / "no"}
    targets |= {"upwards": Path("..") / "outside" / "checkpoint-1"}
    for name, kind in things.items():
        path = folder / name
        if not path.parent.is_dir() or path.is_symlink() or path.exists():
            continue
        if kind == "folder":
            path.mkdir()
            (path / "inside").write_text("x")
        elif kind == "file":
            path.write_text("x")
        elif kind == "pipe":
            os.mkfifo(path)  # who opens it to read waits for ever
        else:
            path.symlink_to(targets.get(kind, path.name))


def things(*names: str) -> st.SearchStrategy[dict[str, str]]:
    """What :func:`furnish` is to put under some of these names."""
    return st.dictionaries(st.sampled_from(names), st.sampled_from(KINDS), max_size=6)
