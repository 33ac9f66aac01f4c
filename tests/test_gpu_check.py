"""The checks of `make gpu-check`, at small sizes on the CPU."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from support.small_runs import base_folder
from support.tiny_models import one_thread

from benchmarks import gpu_check
from benchmarks.gpu_check import FAILED, MEASURED, NOT_RUN, PASSED, Finding, Place, judged
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.quantized import dequantized


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("gpu")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = base_folder(folder / "model", "bert", **still)
    return Place(torch.device("cpu"), folder, str(model), small=True)


@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.__name__)
def test_every_check_passes_on_the_cpu(place: Place, check: object) -> None:
    with one_thread():
        found = [case() for _, case in check(place)]  # type: ignore[operator]
    assert found
    for finding in found:
        assert finding.status in (PASSED, MEASURED), finding
        assert finding.figures and all(math.isfinite(v) for v in finding.figures.values())


def test_wrong_products_fail(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that computes something else does not pass."""
    monkeypatch.setattr(gpu_check, "dequantized", lambda layer: 1.1 * dequantized(layer))
    ((_, case),) = gpu_check.four_bit(place)
    finding = case()
    assert finding.status == FAILED and "output_apart is" in finding.why


def test_nan_does_not_pass() -> None:
    assert judged("a", "b", {"x": 1.0}, x=float("nan")).status == FAILED
    assert judged("a", "b", {"x": 1.0}, x=0.5, y=7.0).status == PASSED


def test_what_cannot_run_is_not_passed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(place: Place) -> gpu_check.Cases:
        def case() -> Finding:
            raise UsageError("bitsandbytes is not installed", where="here", fix="install it")

        yield "nf4", case

    def broken(place: Place) -> gpu_check.Cases:
        yield "case", lambda: Finding("broken", "case", PASSED, figures={"x": 1 / 0})

    monkeypatch.setattr(gpu_check, "CHECKS", (refusing, broken))
    first, second = gpu_check.run_checks(place)
    assert (first.status, second.status) == (NOT_RUN, FAILED)
    assert "not run: bitsandbytes is not installed" in gpu_check.line_of(first)
    assert "ZeroDivisionError" in gpu_check.line_of(second)
    late = Place(place.device, place.folder, place.model, small=True, deadline=0.0)
    assert {finding.status for finding in gpu_check.run_checks(late)} == {NOT_RUN}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_findings_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(place: Place) -> gpu_check.Cases:
        yield "case", lambda: judged("failing", "case", {"x": 1.0}, x=2.0)

    out = tmp_path / "out.json"
    monkeypatch.setattr(gpu_check, "CHECKS", (failing,))
    monkeypatch.setattr(gpu_check, "still_model", lambda folder: folder)
    options = ["gpu_check", "--device", "cpu", "--small", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", options)
    assert gpu_check.main() == 1
    assert "0 passed, 1 failed, 0 measured, 0 not run" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["counts"][FAILED] == 1 and record["findings"][0]["why"]
    assert record["small"] is True and record["device"] == "cpu"
