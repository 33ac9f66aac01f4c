"""Arbitrary names on the command line are found or refused with a formatted error."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st
from support.cli_runs import Cli
from support.hostile_cases import check_harmless, property_test, scratch_folder
from support.hostile_text import HOSTILE_TEXTS

from sparsegrad_cli.cli.app import app
from sparsegrad_cli.cli.output import run_guarded
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.export.output_folder import check_output_folder, write_export
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.study import make_study
from sparsegrad_cli.records.store import RunWriter
from sparsegrad_cli.run.folder import lock_folder, prepare_folder
from sparsegrad_cli.study.folder import StudyFolder, safe_name

LONG = ("x" * 5000, "x" * 250, "x/" * 200, "/" + "x/" * 3000, "é" * 200)
ODD = (
    "-",
    "--",
    "-o",
    "a=b",
    "x.yaml",
    "/",
    ".",
    "/dev/null/x",
    "~nobody/x",
    "~",
    "1e-4",
)


def _can_be_named(text: str) -> bool:
    """Return whether a shell can pass the text as an argument."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def names() -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from((*HOSTILE_TEXTS, *LONG, *ODD)), st.text()).filter(
        _can_be_named
    )


COMMANDS = (
    ("report",),
    ("report", "--json"),
    ("export", "--to", "merged"),
    ("validate",),
    ("compare",),
    ("configs", "copy"),
)


def ended(*arguments: str) -> int:
    """Run a command in this process, check its errors, and return its exit code."""
    shown, before = io.StringIO(), sys.argv
    sys.argv = ["sparsegrad", *arguments]
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            code = run_guarded(app)
    finally:
        sys.argv = before
    check_harmless(shown.getvalue())
    assert "not foreseen" not in shown.getvalue()
    return code


@property_test(
    "any name of a run, a recipe or a file, on the command line",
    few=20,
    command=st.sampled_from(COMMANDS),
    name=names(),
)
def test_names_on_the_command_line(command: tuple[str, ...], name: str) -> None:
    with scratch_folder():
        code = ended(*command, name)
    assert code in (0, 1, 2)
    if code:
        raise SparsegradError("refused", where="the command line")


@property_test("any name of a folder to write to", few=20, name=names())
def test_names_of_folders_to_write_to(name: str) -> None:
    """Folders of runs, comparisons and exports are created under any name."""
    recipe = load_recipe(None).recipe
    study = make_study(None, ("lora",), 2, ("task=glue/rte", "method.density=0.01"))
    inside = Path("new", *(part for part in Path(name).parts if part not in ("/", "..")))
    with scratch_folder() as folder:
        run, comparison = folder / "runs" / inside, folder / "compared" / inside
        with lock_folder(run):
            prepare_folder(run, recipe, resume=False, overwrite=False)
            RunWriter(run, command="train").save()
        assert (run / "run.json").is_file()
        place = StudyFolder(comparison)
        with place.held(overwrite=False):
            place.begin(lambda: study, overwrite=False)
        assert (comparison / "cells").is_dir()
        export = check_output_folder(folder / "exports" / inside, [run], overwrite=False)
        write_export(export, lambda new: (new / "x").touch(), overwrite=False)
        assert (export / "x").is_file()


@property_test(
    "any text as a folder's name",
    text=st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text()),
    many=1000,
)
def test_safe_names(text: str) -> None:
    """A safe name is one path component of at most 200 characters, not ``.`` or ``..``."""
    name = safe_name(text)
    assert Path(name).name == name and name not in ("", ".", "..") and len(name) <= 200
    assert Path("/a", name).parent == Path("/a")


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "x/" * 1900])
def test_name_that_is_too_long_is_refused(cli: Cli, name: str) -> None:
    """For such a name, even ``Path.exists`` raises an error."""
    written = ("train", "-o"), ("calibrate", "-o"), ("compare", "--methods", "lora,full", "-o")
    for command in written:
        outcome = cli(*command, name)
        assert outcome.code == 1 and "cannot be written: File name too long" in outcome.flat
    for reading in (("report",), ("export", "--to", "merged")):
        outcome = cli(*reading, name)
        assert outcome.code == 2 and "does not exist" in outcome.flat


@pytest.mark.parametrize("name", ["x" * 5000, "no/such/folder/x", "/dev/null/x", "x" * 255 + "y"])
def test_recipe_copy_to_an_impossible_path_is_refused(cli: Cli, name: str) -> None:
    outcome = cli("configs", "copy", "quickstart", name)
    assert outcome.code == 1 and "cannot be written" in outcome.flat
