"""Load models from folders and names of every kind, and refuse others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import chat_model_folder, chat_turns, load
from support.small_runs import base_folder, data_folder, train

from sparsegrad_cli.errors import DownloadError, FileFormatError, SparsegradError, UsageError
from sparsegrad_cli.generate.load_chat_model import load_chat_model
from sparsegrad_cli.generate.options import ModelOptions
from sparsegrad_cli.models.digests import weights_digest
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings


def answer(loaded: tuple[Any, Any, dict[str, Any]]) -> str:
    model, tokenizer, _ = loaded
    return (
        Answerer(model, tokenizer, GenerationSettings(max_new_tokens=8))
        .answer([chat_turns("a")])[0]
        .text
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_in_its_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = chat_model_folder(tmp_path / "m", dtype=dtype)
    model, _, record = load(folder)
    assert model.dtype == dtype and record["dtype"] == str(dtype).removeprefix("torch.")
    assert record["model"] == str(folder) and record["kind"] == "model"
    other = load(folder, dtype="float32")
    assert other[0].dtype == torch.float32
    assert (other[2]["digest"] == record["digest"]) == (dtype == torch.float32)


def test_the_digest_covers_every_weight(tmp_path: Path) -> None:
    model, _, record = load(chat_model_folder(tmp_path / "m"))
    again = load(chat_model_folder(tmp_path / "n"))[2]
    assert record["digest"] == again["digest"] == weights_digest(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert weights_digest(model) != record["digest"]


def test_a_lora_folder_answers_as_with_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = load(chat_model_folder(tmp_path / "base"))
    wrapped: Any = get_peft_model(
        load(tmp_path / "base")[0], LoraConfig(r=4, target_modules=["up_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path / "lora")
    loaded = load(tmp_path / "lora")
    assert loaded[2]["kind"] == "lora" and loaded[2]["base"] == str(tmp_path / "base")
    assert loaded[2]["digest"] != base[2]["digest"]
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded[0](ids).logits, wrapped.eval()(ids).logits)
    merged = wrapped.merge_and_unload()
    assert answer(loaded) == answer((merged, loaded[1], {})) != answer(base)
    # One that an export wrote says in what dtype the run's base was.
    about = {"model": {"dtype": "bfloat16", "quantization": None}}
    (tmp_path / "lora" / "export.json").write_text(json.dumps(about))
    assert load(tmp_path / "lora")[2]["dtype"] == "bfloat16"
    assert load(tmp_path / "lora", dtype="float32")[2]["digest"] == loaded[2]["digest"]


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run",
        base_folder(tmp_path / "bert"),
        data_folder(tmp_path / "data"),
        "method=lora",
    )
    with pytest.raises(UsageError, match="that generates text"):
        load(run)


def damaged_lora(folder: Path) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    return str(folder)


def lora_without_weights(folder: Path) -> str:
    chat_model_folder(folder / "base")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "base"), "r": 2}
    config["target_modules"] = ["up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (damaged_lora, FileFormatError, "adapter_config.json"),
        (lora_without_weights, FileFormatError, "peft cannot load"),
        (empty, FileFormatError, "config.json"),
        (lambda folder: "builtin:minilm", UsageError, "needs a causal language model"),
        (lambda folder: "no-such/model", DownloadError, "local folder"),
        (lambda folder: "builtin:other", SparsegradError, "builtin"),
        (lambda folder: str(folder), UsageError, "no folder"),
        (lambda folder: "./x", UsageError, "no folder"),
        (lambda folder: "runs/no-such-run", UsageError, "no folder"),
    ],
)
def test_sources_that_cannot_be_loaded_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, error: Any, says: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(error, match=says):
        load(make(tmp_path / "m"))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_chat_model(ModelOptions("builtin:smollm2", device=device))
    assert caught.value.where == "--device"


def test_options_for_runs_are_refused_for_other_models(tmp_path: Path) -> None:
    folder = chat_model_folder(tmp_path / "m")
    with pytest.raises(UsageError, match="applies to runs"):
        load(folder, overrides=("model.name=x",))
    with pytest.raises(UsageError, match="not a dtype"):
        load(folder, dtype="int8")
