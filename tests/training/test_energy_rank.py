"""A rank given as a share of energy: the same whether the basis is fresh or read from a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from little import base_folder, data_folder, train
from safetensors.torch import load_file
from tiny import one_thread

SHARE = ("method.form=core", "method.density=0.05", "method.rank=0.7", "train.save_total_limit=5")


def test_a_resumed_or_a_reused_basis_is_not_cut_once_more(tmp_path: Path) -> None:
    base, data = base_folder(tmp_path / "base"), data_folder(tmp_path / "data")
    with one_thread():
        whole = train(tmp_path / "whole", base, data, *SHARE)
        half = Path(shutil.copytree(whole, tmp_path / "half"))
        shutil.rmtree(half / "adapter")
        shutil.rmtree(half / "checkpoint-6")
        train(half, base, data, *SHARE, resume=True)
        basis = f"calibration.basis={whole / 'basis.safetensors'}"
        reused = train(tmp_path / "reused", base, data, *SHARE, basis)
    expected = load_file(whole / "adapter" / "adapter.safetensors")
    for run in (half, reused):
        got = load_file(run / "adapter" / "adapter.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
