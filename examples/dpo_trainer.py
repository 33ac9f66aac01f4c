"""Align a chat model with the DPOTrainer of TRL; the base model is the reference.

python examples/dpo_trainer.py [MODEL]     a hub id or a folder; HuggingFaceTB/SmolLM2-135M-Instruct
                                           by default. Needs `pip install trl`.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(MODEL)
data = Dataset.from_dict(
    {
        "prompt": [f"{i} plus 1 is" for i in range(12)],
        "chosen": [f" {i + 1}." for i in range(12)],
        "rejected": [f" {i}." for i in range(12)],
    }
)
texts = [p + c for p, c in zip(data["prompt"], data["chosen"], strict=True)]
rows = tokenizer(texts, padding=True, return_tensors="pt")
labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
basis = sg.calibrate(model, [{**rows, "labels": labels}])
model = get_peft_model(model, sg.peft.SparseGradConfig(basis=basis, task_type="CAUSAL_LM"))

trainer = DPOTrainer(
    model,
    args=DPOConfig(
        "dpo",
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    optimizers=(sg.peft.optimizer(model, lr=3e-3), None),
)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]  # one per step
print(f"DPO loss from {losses[0]:.6f} to {losses[-1]:.6f}")
