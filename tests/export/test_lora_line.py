"""The printed load line of a LoRA export loads the model that was checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import answers, byte_tokenizer, data_folder, record, train
from support.tiny_models import build, config

from sparsegrad_cli.export.export_run import export_run
from sparsegrad_cli.export.forms import ExportOptions


def on_the_hub(name: str, revision: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the hub cache of a model that was downloaded at one revision only."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    cached, commit = place / f"models--{name.replace('/', '--')}", "0123456789" * 4
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / revision).write_text(commit)
    return cached / "snapshots" / commit


def test_load_line_works_for_a_base_with_every_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the hub at a revision, in another dtype than the run's, without a pad token, with a head
    for other labels."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base, tokenizer = on_the_hub("me/tiny", "v1", tmp_path / "hub", monkeypatch), byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    settings = config("gpt2", **shape, pad_token_id=None, num_labels=3)
    model: Any = build(AutoModelForSequenceClassification, settings, seed=3)
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = data_folder(tmp_path / "data")
    run = train(tmp_path / "run", Path("me/tiny"), data, "model.revision=v1", "method=lora")
    said = export_run(run, ExportOptions("lora", tmp_path / "lora")).to_json()
    assert said["check"]["difference"] <= said["check"]["judged"]["tolerance"] < 1e-2
    about = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("me/tiny", "v1")

    names = {
        "PeftModel": PeftModel,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    }
    loaded = eval(said["load"], names)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loss = answers(loaded, tokenizer)[1]  # in one batch, padded
    assert loss == pytest.approx(record(run)["metrics"]["final"]["loss"], abs=2e-5)
