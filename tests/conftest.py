"""Fixtures of all tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from small import Cli, Outcome
from tried import table

from sparsegrad_cli.cli.app import app
from sparsegrad_cli.cli.errors import run_guarded

# A shell's background job ignores Ctrl-C, and so would every process that a test starts from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """``cli("train", "seed=1")``: the command line in this process, in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
    lines = table(reports)
    if lines:
        terminalreporter.section("hostile cases")
        for line in lines:
            terminalreporter.write_line(line)
