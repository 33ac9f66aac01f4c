"""Fine-tune a chat model with the SFTTrainer of TRL.

python examples/sft_trainer.py [MODEL]     a hub id or a folder; HuggingFaceTB/SmolLM2-135M-Instruct
                                           by default. Needs `pip install trl`.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(MODEL)
texts = [f"{i} plus {j} is {i + j}." for i in range(6) for j in range(6)]

batches = []
for start in range(0, len(texts), 6):
    rows = tokenizer(texts[start : start + 6], padding=True, return_tensors="pt")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    batches.append({**rows, "labels": labels})
basis = sg.calibrate(model, batches)
model = get_peft_model(model, sg.peft.SparseGradConfig(basis=basis, task_type="CAUSAL_LM"))

trainer = SFTTrainer(
    model,
    SFTConfig(
        "sft",
        max_steps=3,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    optimizers=(sg.peft.optimizer(model, lr=1e-3), None),
)
trainer.train()
trainer.save_model("sft")

again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), "sft").eval()
with torch.no_grad():
    same = torch.equal(again(**batches[0]).logits, model.eval()(**batches[0]).logits)
print(f"the adapter that TRL saved gives the same logits: {same}")
