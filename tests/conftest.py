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
from support.warm_python import warm_server

from sparsegrad_cli.cli.app import app
from sparsegrad_cli.cli.output import run_guarded
from sparsegrad_cli.memory.frozen_gc import frozen_gc
from sparsegrad_cli.report import svg

# A shell's background job ignores Ctrl-C, and so would every process that a test starts from there.
signal.signal(signal.SIGINT, signal.default_int_handler)

_TO_SVG = svg.to_svg
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


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures empty: drawing them takes longer than training a tiny model.

    Tests in tests/report and tests/hostile draw them, and tests that request ``figures``.
    """
    if request.path.parent.name not in ("report", "hostile"):
        monkeypatch.setattr(svg, "to_svg", lambda figure: "<svg></svg>")


@pytest.fixture
def figures(_no_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of reports in this test."""
    monkeypatch.setattr(svg, "to_svg", _TO_SVG)


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a random BERT of two blocks, for runs of which the pretrained weights do not matter."""
    from support.small_runs import base_folder

    shape: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    return str(base_folder(tmp_path_factory.mktemp("small") / "bert", **shape))


@pytest.fixture(scope="session")
def warm_client() -> Iterator[str]:
    """Return the path of the program that takes the place of ``python``."""
    with warm_server() as client:
        yield client


@pytest.fixture
def warm_python(warm_client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start Python programs in forks of a process that has imported all libraries."""
    monkeypatch.setattr(sys, "executable", warm_client)


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
