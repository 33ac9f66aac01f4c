"""Fine-tune a classifier in a plain PyTorch loop, save the adapter, load it again.

python examples/plain_loop.py [MODEL]     a hub id or a folder; bert-base-uncased by default
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased"
TEXTS = ["a fine film", "dull and long", "I loved it", "what a waste of time"] * 8
LABELS = [1, 0, 1, 0] * 8

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
batches = [
    {**{k: v[i : i + 8] for k, v in rows.items()}, "labels": torch.tensor(LABELS[i : i + 8])}
    for i in range(0, len(TEXTS), 8)
]

basis = sg.calibrate(model, batches)
config = sg.peft.SparseGradConfig(basis=basis, density=0.01, task_type="SEQ_CLS")
model = get_peft_model(model, config)
model.print_trainable_parameters()
optimizer = sg.peft.optimizer(model, lr=1e-3)

for epoch in range(3):
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.save_pretrained("adapter")
model.eval()
torch.manual_seed(0)  # the base model's new classifier is replaced by the saved one
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
again = PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    same = torch.equal(model(**batches[0]).logits, again(**batches[0]).logits)
print(f"the loaded adapter gives the same logits: {same}")
