"""The code of the page on adding a method works and keeps the contract of a method."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_runs import base_folder, data_folder

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "how-to" / "add-a-method.md"
REGISTRY = "sparsegrad_cli/methods/registry.py"


def files_of_page() -> dict[str, str]:
    """Return path -> code of each block that starts with a path."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(blocks)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package to a folder and add the method of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("sparsegrad_cli", "configs", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
    files = files_of_page()
    line, entry = re.fullmatch(
        r"(from [^\n]+)\n\nMETHODS: [^\n]+\n([^\n]+\n)}\n", files.pop(REGISTRY)
    ).groups()  # type: ignore[union-attr]
    registry = (folder / REGISTRY).read_text()
    opening = "METHODS: dict[str, type[MethodSettings]] = {\n"
    assert opening in registry
    (folder / REGISTRY).write_text(registry.replace(opening, f"{line}\n\n{opening}{entry}"))
    for path, code in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(code)
    return folder


def run(copy: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_documented_method_validates_trains_and_exports(copy: Path) -> None:
    base_folder(copy / "base", num_hidden_layers=1, intermediate_size=12)
    data_folder(copy / "data")
    settings = (
        *("method=scale", f"model={copy / 'base'}", "task=csv", f"task.path={copy / 'data'}"),
        *("task.max_length=16", "train.max_steps=3", "train.use_cpu=true"),
        f"output_dir={copy / 'run'}",
    )
    run(copy, "sparsegrad_cli", "validate", *settings)
    run(copy, "sparsegrad_cli", "train", *settings)
    record = json.loads((copy / "run" / "run.json").read_text())
    assert record["status"] == "done" and record["method"]["name"] == "scale"
    assert record["counts"]["trainable_targets"] == 12 + 16
    run(copy, "sparsegrad_cli", "export", str(copy / "run"), "--to", "merged")
    refused = subprocess.run(
        [sys.executable, "-m", "sparsegrad_cli", "validate", "method=scale", "method.rank=3"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "method.rank" in refused.stderr


def test_documented_method_keeps_the_contract(copy: Path) -> None:
    tests = REPOSITORY / "tests" / "methods" / "test_contract.py"
    options = ("-q", "-p", "no:cacheprovider", "-c", str(REPOSITORY / "pyproject.toml"))
    shown = run(copy, "pytest", str(tests), *options, "-k", "scale and not gpt2")
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None and int(passed[1]) >= 12
