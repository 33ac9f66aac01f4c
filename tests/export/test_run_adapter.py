"""The adapter of a LoRA run is a PEFT folder, which peft loads by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.small_runs import answers, base_of, by_peft, by_transformers, record, tokenizer_of

import sparsegrad_cli
from sparsegrad_cli.methods.peft_folder import from_peft, to_peft
from sparsegrad_cli.restore.restore import load_trained
from sparsegrad_cli.restore.run_files import open_run

Exported = Callable[..., tuple[Path, dict[str, Any]]]

# name -> (overrides, architecture)
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "head": (("method=lora", "method.rank=3", "method.alpha=5"), "bert"),
    "rest": (("method=lora", "method.rslora=true", "scope=rest"), "bert"),
    "conv1d-rest": (("method=lora", "scope=rest"), "gpt2"),
    "two-layer-head": (("method=lora", "method.dropout=0.1"), "roberta"),
    "layers-before-the-head": (("method=lora",), "distilbert"),
    "gated": (("method=lora",), "llama"),
}


def logits_of_run(run: Path) -> torch.Tensor:
    """Return the logits of the run as this package restores it."""
    model = load_trained(open_run(run, ()), 8).setup.model
    return answers(model, tokenizer_of(run))[0]


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_the_adapter_of_a_lora_run_with_the_same_answers(
    name: str, runs: Callable[..., Path], exported: Exported
) -> None:
    overrides, architecture = CASES[name]
    run = runs(*overrides, architecture=architecture)
    folder = run / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == base_of(run)
    model = by_peft(run, folder)
    logits, loss = answers(model, tokenizer_of(run))
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=2e-5)
    torch.testing.assert_close(logits, logits_of_run(run), atol=1e-5, rtol=1e-5)
    # What the base model's files lack was drawn by the run: it is in the folder, too.
    fresh = record(run)["model"]["head"]["fresh"]
    names = load_file(folder / "adapter_model.safetensors")
    assert all(f"base_model.model.{one}" in names for one in fresh)
    # Merged, and by transformers' own door.
    plain = by_peft(run, folder).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(answers(plain, tokenizer_of(run))[0], logits, atol=1e-4, rtol=0)
    inside = by_transformers(base_of(run), num_labels=2, pad_token_id=0)
    inside.load_adapter(str(folder))  # type: ignore[operator]
    torch.testing.assert_close(answers(inside, tokenizer_of(run))[0], logits, atol=1e-5, rtol=1e-5)

    own, said = exported(run, "adapter")
    assert said["check"]["difference"] == 0.0
    loaded = sparsegrad_cli.load_adapter(own)
    torch.testing.assert_close(answers(loaded, tokenizer_of(run))[0], logits, atol=1e-5, rtol=1e-5)


def test_other_methods_write_no_peft_folder(runs: Callable[..., Path]) -> None:
    run = runs("method=full")
    assert [path.name for path in (run / "adapter").iterdir()] == ["adapter.safetensors"]


def test_adapter_of_version_0_1_0_is_read(
    runs: Callable[..., Path], exported: Exported, copy: Callable[[Path], Path]
) -> None:
    """Its adapter has the model's names, no PEFT settings, and no randomly drawn parameters."""
    run = runs(*CASES["head"][0])
    old = copy(run)
    path = old / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = from_peft(load_file(path))
    fresh = record(run)["model"]["head"]["fresh"]
    kept = {n: t for n, t in tensors.items() if n not in fresh or n.startswith("classifier.")}
    assert any(".lora_A.default.weight" in name for name in kept)
    shutil.rmtree(old / "adapter")
    (old / "adapter").mkdir()
    save_file(kept, old / "adapter" / "adapter.safetensors", metadata)
    found = record(old)
    del found["model"]["head"]
    (old / "run.json").write_text(json.dumps(found), encoding="utf-8")
    assert torch.equal(logits_of_run(old), logits_of_run(run))
    assert exported(old, "lora")[1]["check"]["difference"] < 1e-5


def test_peft_names_round_trip() -> None:
    names = {
        "bert.a.lora_A.default.weight": "base_model.model.bert.a.lora_A.weight",
        "bert.a.lora_B.default.weight": "base_model.model.bert.a.lora_B.weight",
        "bert.a.base_layer.bias": "base_model.model.bert.a.base_layer.bias",
        "classifier.weight": "base_model.model.classifier.weight",
    }
    tensors = {name: torch.zeros(1) for name in names}
    there = to_peft(tensors)
    assert list(there) == list(names.values()) and list(from_peft(there)) == list(names)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "infinite"])
def test_damaged_peft_adapter_is_refused(
    change: str,
    runs: Callable[..., Path],
    copy: Callable[[Path], Path],
    refused: Callable[..., Any],
) -> None:
    run = copy(runs(*CASES["head"][0]))
    path = run / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if ".lora_A." in name)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["base_model.model.bert.embeddings.word_embeddings.weight"] = torch.zeros(258, 16)
    elif change == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name][0, 0] = float("inf")
    save_file(tensors, path, metadata)
    said = refused(1, run, "--to", "merged")
    assert "the trained parameters do not fit the model" in said.flat
