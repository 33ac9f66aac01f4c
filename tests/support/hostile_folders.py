"""Strategies for hostile folders: links to anywhere, files in place of folders, pipes."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import strategies as st

KINDS = ("folder", "file", "pipe", "to a folder", "to a file", "to nothing", "to itself", "upwards")


def fill_folder(folder: Path, things: dict[str, str]) -> None:
    """Make files, folders and links in a folder, and a folder ``outside`` beside it.

    Tests check that ``outside`` is unchanged.
    """
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
            os.mkfifo(path)  # opening it for reading waits for ever
        else:
            path.symlink_to(targets.get(kind, path.name))


def folder_entries(*names: str) -> st.SearchStrategy[dict[str, str]]:
    """Draw what :func:`fill_folder` puts under some of these names."""
    return st.dictionaries(st.sampled_from(names), st.sampled_from(KINDS), max_size=6)
