"""The structure of the package: layers, cycles, and habits that we avoid.

`python -m benchmarks.codebase --list FIGURE` prints the places behind each figure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codebase import LAYERS, Codebase, layer_of

# Modules that may use private attributes of a dependency: file -> the dependency and why.
PRIVATE = {
    "estimate/fake_tensors.py": "torch: operators of aten, which start with an underscore",
    "interruption.py": "os._exit is public in spite of its name",
    "memory/storage_tracker.py": "torch: indices of a sparse tensor that is not coalesced",
    "peft/layer.py": "torch: whether a module has hooks",
    "peft/model.py": "peft: what a tuner overrides and calls; see peft/registration.py",
    "peft/registration.py": "peft: its docstring names the version checked with",
    "training/accelerator.py": "accelerate: its docstring names the version checked with",
}


@pytest.fixture(scope="module")
def code() -> Codebase:
    return Codebase()


def test_modules_import_only_their_own_layer_and_those_below(code: Codebase) -> None:
    assert [str(found) for found in code.upward] == []


def test_no_modules_import_each_other_in_a_circle(code: Codebase) -> None:
    assert code.cycles == []


def test_every_part_of_the_package_has_a_layer(code: Codebase) -> None:
    unknown = {module for module in code.modules if module and layer_of(module) < 0}
    assert unknown == set()
    parts = {name for row in LAYERS for name in row}
    there = {module.split(".")[0] for module in code.modules}
    assert parts <= there, "a layer names a part that does not exist"


def test_private_attributes_of_dependencies_stay_in_modules_named_for_them(code: Codebase) -> None:
    elsewhere = [str(f) for f in code.private_attributes if f.file not in PRIVATE]
    assert elsewhere == []
    used = {f.file for f in code.private_attributes}
    assert set(PRIVATE) <= used, "a module on the list uses no private attribute any more"


def test_files_are_locked_and_forced_to_disk_in_io_only(code: Codebase) -> None:
    # A journal locks its own file: a lock on the folder would exclude the journals beside it.
    assert {found.file for found in code.lock_calls} == {"io/locks.py", "io/jsonl.py"}
    assert {found.file for found in code.atomic_writers} == {"io/atomic.py", "io/jsonl.py"}


def test_recipes_records_and_reports_need_no_torch() -> None:
    """Commands that only read start fast."""
    modules = ["recipe.load_recipe", "records.store", "methods.registry", "cli.app"]
    program = "\n".join(f"import sparsegrad_cli.{name}" for name in modules)
    program += (
        "\nimport sys; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
