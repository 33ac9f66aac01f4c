"""Every method trains from its recipe to the end of a run, with its record and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.adapter_paths import adapter_path
from support.small_runs import base_folder, data_folder, record, train

from sparsegrad_cli.methods.peft_types.tuner_facts import VARIANTS
from sparsegrad_cli.methods.registry import METHODS
from sparsegrad_cli.records.store import load_run
from sparsegrad_cli.report.render import render
from sparsegrad_cli.report.run import run_document

NAMES = sorted({*METHODS, *VARIANTS} - {"peft"})
# One at least of each kind: a change beside the layer, an optimizer, a start from batches.
FAST = {"sparsegrad", "lora", "sara", "galore", "eva", "lora_ga"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny BERT and 48 rows of text."""
    folder = tmp_path_factory.mktemp("every")
    return base_folder(folder / "base"), data_folder(folder / "data")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in NAMES]
)
def test_trains_to_the_end_with_a_record_and_a_report(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run = train(tmp_path / "run", *folders, f"method={name}")
    found: dict[str, Any] = record(run)
    assert found["status"] == "done"
    counts = found["counts"]
    assert counts["trainable_targets"] > 0 and counts["touched_targets"] > 0
    assert adapter_path(run).stat().st_size > 0
    assert "loss" in render(run_document(load_run(run)), "md")
    sparsity = found["sparsity"]
    if sparsity is not None:
        target = next(t for t in counts["targets"] if t["name"] == sparsity["target"])
        assert any(share > 0 for row in sparsity["map"] for share in row)
        assert target["touched"] > 0
