"""Adapters that TRL trained and saved give the same bits in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file
from support.chat_models import chat_model_folder
from support.paths import REPO
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsegrad_cli as sg

pytestmark = pytest.mark.slow

SUPPORTS = ("static", "dense", "dynamic", "refresh")
LOADERS = ("from_pretrained", "auto", "transformers")
# The other process: PEFT and transformers, and one import of ours.
PROGRAM = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

def save_logits(model, name):
    with torch.no_grad():
        logits = model.eval()(**load_file("prompts.safetensors")).logits
    save_file({"logits": logits}, f"{name}.safetensors")

save_logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora"), "lora")
assert not any(name.startswith("sparsegrad") for name in sys.modules)

import sparsegrad_cli.peft

for adapter in sys.argv[1:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter)
    save_logits(model, f"{adapter}-from_pretrained")
    save_logits(AutoPeftModelForCausalLM.from_pretrained(adapter), f"{adapter}-auto")
    model = AutoModelForCausalLM.from_pretrained("base")
    model.load_adapter(adapter)
    save_logits(model, f"{adapter}-transformers")
"""


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(4, 260, (4, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**prompts()).logits
    return found


def conversation(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is {number} plus 1?"}
    return {"messages": [question, {"role": "assistant", "content": str(number + 1)}]}


def train(support: str) -> Any:
    """Train with TRL in the working folder, save the adapter as ``support``, return the model.

    SFTTrainer makes the adapter and its optimizer, unless the support needs our optimizer.
    """
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("base")
    settings: Any = {"support": support, "rank": 8, "task_type": "CAUSAL_LM"}
    if support != "dense":
        settings["density"] = 0.05
    basis = sg.calibrate(model, [prompts() | {"labels": prompts()["input_ids"]}], rank=8)
    config = sg.peft.SparseGradConfig(basis=basis, **settings)
    made: dict[str, Any] = {"model": model, "peft_config": config}
    if support in ("dynamic", "refresh"):
        tuned = get_peft_model(model, config)
        made = {"model": tuned, "optimizers": (sg.peft.optimizer(tuned, lr=1e-2), None)}
    trainer = SFTTrainer(
        args=SFTConfig(
            support,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([conversation(number) for number in range(12)]),
        processing_class=AutoTokenizer.from_pretrained("base", pad_token="</s>"),
        **made,
    )
    trainer.train()
    trainer.save_model(support)
    return trainer.model


def test_trained_in_trl_and_loaded_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    base: Any = AutoModelForCausalLM.from_pretrained(chat_model_folder(tmp_path / "base"))
    save_file(prompts(), "prompts.safetensors")
    untrained = logits_of(base)
    expected = {}
    for support in SUPPORTS:
        model = train(support)
        expected[support] = logits_of(model)
        if support == "static":
            save_as_lora("lora", model, 8)
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SUPPORTS], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for support, logits in expected.items():
        assert not torch.allclose(logits, untrained)
        for loader in LOADERS:
            loaded = load_file(f"{support}-{loader}.safetensors")["logits"]
            assert torch.equal(loaded, logits), (support, loader)
    as_lora = load_file("lora.safetensors")["logits"]
    torch.testing.assert_close(as_lora, expected["static"], atol=1e-5, rtol=1e-4)
