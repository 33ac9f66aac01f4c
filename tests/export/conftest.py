"""Tiny runs, each trained once for all tests of exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Cli, Outcome
from support.small_runs import base_folder, data_folder, train
from support.tiny_models import one_thread

Runs = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """``runs("method=full", architecture="gpt2")`` returns a trained run, made once per session."""
    place = tmp_path_factory.mktemp("exports")
    data = data_folder(place / "data")
    made: dict[Any, Path] = {}

    def run(*overrides: str, architecture: str = "bert", stop: bool = False) -> Path:
        base = place / architecture
        if not base.is_dir():
            base_folder(base, architecture)
        key = (overrides, architecture, stop)
        if key not in made:
            with one_thread():
                made[key] = train(place / f"run-{len(made)}", base, data, *overrides, stop=stop)
        return made[key]

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """``copy(run)`` returns a copy of the run that the test may damage."""

    def copied(run: Path) -> Path:
        return Path(shutil.copytree(run, tmp_path / f"{run.name}-copy"))

    return copied


@pytest.fixture
def exported(cli: Cli, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """``exported(run, "lora", "--rank", "4")``: the folder, and what export.json says."""

    def export(run: Path, to: str, *options: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / f"{run.name}-{to}"
        outcome = cli("export", str(run), "--to", to, "-o", str(folder), "--json", *options)
        assert outcome.code == 0, outcome.err
        record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        assert json.loads(outcome.out) == {**record, "output_dir": str(folder)}
        return folder, record

    return export


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., Outcome]:
    """``refused(2, run, "--to", "merged")`` checks the exit code, one error block, no new file."""

    def export(code: int, run: Path, *arguments: str) -> Outcome:
        there = sorted(tmp_path.rglob("*"))
        outcome = cli("export", str(run), *arguments)
        assert outcome.code == code, outcome.err
        assert "Traceback" not in outcome.err and outcome.err.count("╭") == 1
        assert sorted(tmp_path.rglob("*")) == there
        return outcome

    return export
