"""A rank given as a share of energy: the same whether the basis is fresh or read from a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import base_folder, data_folder, train
from support.tiny_models import one_thread

from sparsegrad_cli.numerics.hosvd import SequentialStream, truncated

SHARE = ("method.form=core", "method.density=0.05", "method.rank=0.7", "train.save_total_limit=5")


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_the_sequential_basis_keeps_the_share_of_the_whole(share: float) -> None:
    """64 x 96, spectrum falling: the stream cuts, the core's making finds nothing more to cut."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.linalg.qr(torch.randn(n, 64, generator=generator)).Q for n in (64, 96)]
    grad_OI = (factors[0] * 0.9 ** torch.arange(64)) @ factors[1].T  # (64, 64) @ (64, 96)
    stream = SequentialStream(64, 96, rank=share)
    for _ in range(stream.passes):
        stream.add(grad_OI)
        if stream.gram.shape[0] == 64:
            stream.next_pass()
    basis = stream.basis()
    cut = truncated(basis, share)
    assert cut.q_out.shape[1] == basis.q_out.shape[1] < 64
    held = (cut.q_out.T @ grad_OI).square().sum() / grad_OI.square().sum()
    assert share <= held < share + 0.1


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
