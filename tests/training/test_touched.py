"""Records for comparisons: parameters touched, tokens of calibration, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.small_runs import base_folder, data_folder, record, sentences, train
from torch import nn

from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.tasks.precision import precision_of
from sparsegrad_cli.tasks.setup import hash_block
from sparsegrad_cli.training.sparsity_stats import pooled_share


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny BERT and 48 rows of text."""
    folder = tmp_path_factory.mktemp("touched")
    return base_folder(folder / "base"), data_folder(folder / "data")


@pytest.fixture(scope="module")
def runs(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one run of six steps for each way of choosing parameters."""
    base, data = folders
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "full": ("method=full",),
        "lora": ("method=lora",),
        "meprop": ("method=meprop", "method.density=0.05"),
        "materialized": ("method.form=materialized", "method.density=0.05"),
        "static": ("method.density=0.05",),
        "dynamic": ("method.density=0.05", "method.support=dynamic"),
        "refresh": ("method.density=0.05", "method.support=refresh", "method.refresh_steps=2"),
    }
    # No warm-up: its first step has a rate of zero, and touches entries that it does not move.
    every = (
        "calibration.steps=6",
        "calibration.batch_size=8",
        "train.lr_scheduler_type=constant",
        "train.warmup_steps=0",
    )
    return {name: train(folder / name, base, data, *way, *every) for name, way in ways.items()}


def entries_by_target(run: Path) -> dict[str, int]:
    """Count the parameters of each target in the adapter: positions, or changed values."""
    tensors = load_file(adapter_path(run))
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("positions/"):
            found[name.removeprefix("positions/")] = tensor.numel()
        elif name.endswith(".support"):
            found[name.removesuffix(".support")] = tensor.numel()
        elif name.endswith(".core"):
            found[name.removesuffix(".core")] = int((tensor != 0).sum())
    return found


@pytest.mark.parametrize("way", ["meprop", "materialized", "static", "dynamic", "refresh"])
def test_touched_count_equals_the_parameters_in_the_adapter(
    runs: dict[str, Path], way: str
) -> None:
    counts, held = record(runs[way])["counts"], entries_by_target(runs[way])
    touched = {target["name"]: target["touched"] for target in counts["targets"]}
    assert touched == held
    assert counts["touched_targets"] == sum(held.values())
    beside = counts["trainable_head"] + counts["trainable_rest"]
    assert counts["touched"] == counts["touched_targets"] + beside
    if way == "static":
        assert counts["touched"] == counts["trainable"]
    else:
        assert counts["touched"] > counts["trainable"]


@pytest.mark.parametrize("way", ["full", "lora"])
def test_dense_parameters_all_count_as_touched(runs: dict[str, Path], way: str) -> None:
    made = record(runs[way])
    assert made["counts"]["touched"] == made["counts"]["trainable"]
    assert made["sparsity"] is None


@pytest.mark.parametrize("way", ["meprop", "materialized", "static", "dynamic", "refresh"])
def test_sparsity_map_adds_up_to_the_touched_count(runs: dict[str, Path], way: str) -> None:
    """Shares times block sizes give the count. Sides are small: a block is at most 3 wide."""
    made = record(runs[way])
    there = made["sparsity"]
    target = next(t for t in made["counts"]["targets"] if t["name"] == there["target"])
    rows, columns, shares = there["rows"], there["columns"], there["map"]
    down, across = len(shares), len(shares[0])
    heights = [sum(r * down // rows == at for r in range(rows)) for at in range(down)]
    widths = [sum(c * across // columns == at for c in range(columns)) for at in range(across)]
    total = sum(
        share * height * width
        for row, height in zip(shares, heights, strict=True)
        for share, width in zip(row, widths, strict=True)
    )
    assert total == pytest.approx(target["touched"], abs=0.05)
    if way in ("meprop", "materialized"):
        assert {rows, columns} == {target["out_features"], target["in_features"]}


def test_pooled_share_matches_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    for rows, columns, side in ((5, 7, 3), (2, 9, 24), (30, 31, 24)):
        mask = torch.rand(rows, columns, generator=draw) < 0.3
        positions = torch.nonzero(mask.reshape(-1)).squeeze(1).int()
        found = pooled_share(positions, rows, columns, side)
        down, across = min(rows, side), min(columns, side)
        assert (len(found), len(found[0])) == (down, across)
        for i in range(down):
            for j in range(across):
                block = [
                    mask[r, c]
                    for r in range(rows)
                    for c in range(columns)
                    if (r * down // rows, c * across // columns) == (i, j)
                ]
                assert found[i][j] == round(float(torch.stack(block).double().mean()), 4)


def test_calibration_counts_the_tokens_that_it_reads(runs: dict[str, Path]) -> None:
    """Six batches of eight read the 48 rows once. Each byte is a token, at most 16 per row."""
    once = sum(min(len(text), 16) for text, _ in sentences(1, 48))
    for way, passes in (("materialized", 1), ("static", 1)):
        calibration = record(runs[way])["calibration"]
        assert calibration["warmup_steps"] == 0 and calibration["passes"] == passes
        assert calibration["tokens"] == passes * once
    assert record(runs["lora"]).get("calibration") is None


def test_tokens_of_warmup_further_passes_and_a_reused_basis_are_counted(
    folders: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    base, data = folders
    once = record(runs["static"])["calibration"]["tokens"]
    way = ("calibration.warmup_steps=6", "calibration.score=square", "calibration.steps=6")
    made = record(train(tmp_path / "warm", base, data, *way))["calibration"]
    assert made["passes"] == 2 and made["tokens"] == 3 * once  # the warm-up sees all rows, too
    basis = tmp_path / "warm" / "basis.safetensors"
    reused = record(train(tmp_path / "again", base, data, *way, f"calibration.basis={basis}"))
    assert reused["calibration"]["reused"] is True
    assert reused["calibration"]["tokens"] == made["tokens"]
    assert reused["calibration"]["digest"] == made["digest"]


def test_precision_hash_is_equal_across_methods_and_differs_across_precisions(
    runs: dict[str, Path],
) -> None:
    hashes = {record(run)["hashes"]["precision"] for run in runs.values()}
    assert len(hashes) == 1 and len(hashes.pop()) == 64

    def found(dtype: torch.dtype, labels: int = 2, **train: Any) -> str:
        model, cpu = nn.Linear(3, labels).to(dtype), torch.device("cpu")
        return hash_block(precision_of(model, TrainSection(**train), cpu).formats)

    plain = found(torch.float32)
    assert plain == found(torch.float32, learning_rate=1e-5)
    assert plain == found(torch.float32, labels=3)
    others = [found(torch.bfloat16), found(torch.float32, bf16=True), found(torch.float16)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        others.append(found(torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len({plain, *others}) == 5
