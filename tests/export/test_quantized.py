"""Runs on 8-bit and 4-bit models: resumed bit for bit, exported, loaded without bitsandbytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.cli_runs import Cli
from support.quantized_models import BITS, need_bitsandbytes
from support.small_runs import (
    answers,
    base_folder,
    by_transformers,
    data_folder,
    record,
    tokenizer_of,
    train,
)

import sparsegrad_cli
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.models.quantized import quantized_layers

need_bitsandbytes()
from bitsandbytes.functional import has_avx512bf16  # noqa: E402

# Rows of whole blocks of scales: bitsandbytes' own CPU kernel is right for these alone.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
# A quantized weight has no gradient that a basis could be made of.
CORE = ("method.density=0.05", "method.rank=7", "calibration.source=token")
METHODS = {
    "core": CORE,
    "dynamic": ("method.support=dynamic", *CORE),
    "lora": ("method=lora", "method.rank=3"),
}
Exported = Callable[..., tuple[Path, dict[str, Any]]]
Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``trained("core", "4bit", "llama")`` returns a run, made once per module."""
    place = tmp_path_factory.mktemp("quantized")
    data = data_folder(place / "data")
    made: dict[Any, Path] = {}

    def run(name: str, bits: str, architecture: str = "llama") -> Path:
        base, key = place / architecture, (name, bits, architecture)
        if not base.is_dir():
            base_folder(base, architecture, **WIDE)
        if key not in made:
            more = (f"model.quantization={bits}", *METHODS[name], "train.learning_rate=1e-2")
            made[key] = train(place / f"run-{len(made)}", base, data, *more)
        return made[key]

    return run


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_quantized_run_resumes_bit_for_bit(
    name: str, bits: str, trained: Trained, tmp_path: Path
) -> None:
    whole = trained(name, bits)
    settings = json.loads((whole / "run.json").read_text())
    assert settings["model"]["quantization"] == bits and settings["status"] == "done"
    half, again = tmp_path / "half", tmp_path / "again"
    base, data = whole.parent / "llama", whole.parent / "data"
    more = (f"model.quantization={bits}", *METHODS[name], "train.learning_rate=1e-2")
    more = (*more, "train.save_total_limit=5")
    train(half, base, data, *more)
    shutil.copytree(half, again)
    shutil.rmtree(again / "checkpoint-6")
    shutil.rmtree(again / "adapter")
    train(again, base, data, *more, resume=True)
    expected = load_file(adapter_path(whole))
    assert record(again)["metrics"]["final"] == record(whole)["metrics"]["final"]
    for run in (half, again):
        found = load_file(adapter_path(run))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "architecture"), [("core", "llama"), ("lora", "bert")])
def test_merged_export_of_a_quantized_run_is_a_plain_model(
    name: str,
    architecture: str,
    bits: str,
    trained: Trained,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained(name, bits, architecture)
    folder, said = exported(run, "merged")
    assert said["model"]["quantization"] == bits
    assert said["dequantized"] == {"llama": 7, "bert": 6}[architecture] * 3
    assert any("no longer in" in note for note in said["notes"])
    assert said["check"]["difference"] <= said["check"]["judged"]["tolerance"] < 1e-2
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    plain = by_transformers(folder)
    assert quantized_layers(plain) == {}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loss = answers(plain, tokenizer_of(run))[1]
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=2e-5)


@pytest.mark.parametrize(("name", "architecture"), [("core", "bert"), ("lora", "llama")])
def test_export_of_a_run_evaluated_in_bfloat16_on_a_cpu_is_accepted(
    name: str, architecture: str, trained: Trained, exported: Exported
) -> None:
    if not has_avx512bf16():
        pytest.skip("this CPU has no units for bfloat16: bitsandbytes evaluates as it trains")
    check = exported(trained(name, "4bit", architecture), "lora")[1]["check"]
    assert 1e-3 < check["difference"] / check["largest_logit"] < 0.15
    assert check["judged"]["tolerance"] == pytest.approx(0.2 * check["largest_logit"])


@pytest.fixture
def evaluates_as_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate in float32 on CPUs with bfloat16 units, too."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.usefixtures("evaluates_as_it_trains")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "architecture"), [("core", "bert"), ("lora", "llama")])
def test_lora_folder_loads_onto_the_quantized_base(
    name: str, architecture: str, bits: str, trained: Trained, exported: Exported
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    run = trained(name, bits, architecture)
    _, said = exported(run, "lora")
    check = said["check"]
    assert check["difference"] <= check["judged"]["tolerance"] and not said["truncated"]
    assert check["on_plain_base"]["difference"] > 10 * (bits == "4bit") * check["difference"]
    # The line that the export prints is one that works.
    names = {
        "PeftModel": PeftModel,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "BitsAndBytesConfig": BitsAndBytesConfig,
    }
    model = eval(said["load"], names)
    model.config.pad_token_id = 0
    assert len(quantized_layers(model)) == {"llama": 7, "bert": 6}[architecture] * 3
    loss = answers(model, tokenizer_of(run))[1]
    rounding = 2e-5 if bits == "4bit" else 5e-2
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=rounding)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["core", "dynamic", "lora"])
def test_adapter_loads_onto_a_base_quantized_again(
    name: str, bits: str, trained: Trained, exported: Exported
) -> None:
    run = trained(name, bits)
    folder, said = exported(run, "adapter")
    assert said["check"]["difference"] == 0.0
    model = sparsegrad_cli.load_adapter(folder)
    loss = answers(model, tokenizer_of(run))[1]
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=2e-5)
    plain = by_transformers(run.parent / "llama", num_labels=2, pad_token_id=0)
    with pytest.raises(UsageError, match=f"other weights: .* in float32, quantized to {bits}"):
        sparsegrad_cli.load_adapter(folder, plain)


def test_export_table_shows_what_became_of_the_weights(
    cli: Cli, trained: Trained, tmp_path: Path
) -> None:
    run = trained("core", "4bit")
    merged = cli("export", str(run), "--to", "merged", "-o", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    assert "Dequantized" in merged.err + merged.out and "4bit to float32" in merged.err + merged.out
    lora = cli("export", str(run), "--to", "lora", "-o", str(tmp_path / "lora"))
    assert "reported, not tested" in lora.err + lora.out


def test_calibrate_measures_energy_without_gradients_of_weights(
    cli: Cli, trained: Trained, tmp_path: Path
) -> None:
    """dL/dW = g' x is computed from tokens for the energy table only."""
    run = trained("core", "4bit")
    base, data = run.parent / "llama", run.parent / "data"
    outcome = cli(
        "calibrate",
        f"model={{name: {base}, quantization: 4bit}}",
        "task=csv",
        f"task.path={data}",
        "method.rank=7",
        "calibration.steps=2",
        "train.use_cpu=true",
        "-o",
        str(tmp_path / "basis"),
    )
    assert outcome.code == 0, outcome.err
    rows = record(tmp_path / "basis")["calibration"]["energy"]["rows"]
    assert all(0 < row["original"] < 1 for row in rows) and len(rows) == 9
