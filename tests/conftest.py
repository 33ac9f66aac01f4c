"""Fixtures of all tests."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when huggingface_hub is imported: no test looks for a network, whether there is one or not.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from support.cli_runs import Cli, Outcome
from support.hostile_summary import summary_table

from sparsegrad_cli.cli.app import app
from sparsegrad_cli.cli.output import run_guarded
from sparsegrad_cli.memory.frozen_gc import frozen_gc

# A shell's background job ignores Ctrl-C, and so would every process that a test starts from there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What runs import in the end, and the meter's collections would go over in every one of them.
_LIBRARIES = ("datasets", "evaluate", "peft", "sklearn.metrics", "accelerate")


@pytest.fixture(scope="session", autouse=True)
def _few_objects_to_collect(request: pytest.FixtureRequest) -> Iterator[None]:
    if len(request.session.items) > 50:  # not for a single file that may need none of them
        for name in _LIBRARIES:
            importlib.import_module(name)
        with frozen_gc():
            yield
    else:
        yield


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """``cli("train", "seed=1")``: the command line in this process, in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsegrad", *arguments])
        capsys.readouterr()
        code = run_guarded(app)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the generated cases of tests/hostile came to, in whichever processes they ran."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    lines = summary_table(reports)
    if lines:
        terminalreporter.section("hostile cases")
        for line in lines:
            terminalreporter.write_line(line)
