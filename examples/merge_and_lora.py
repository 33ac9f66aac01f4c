"""Export a trained adapter twice, for users who do not have this package: merged, and as LoRA.

python examples/merge_and_lora.py [MODEL]   a hub id or a folder; bert-base-uncased by default
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel, get_peft_model, save_as_lora
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased"
TEXTS = ["a fine film", "dull and long", "I loved it", "what a waste of time"] * 4
LABELS = [1, 0, 1, 0] * 4


def load(folder: str) -> torch.nn.Module:
    """Return a classifier; the values of a new head follow from the seed."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


rows = AutoTokenizer.from_pretrained(MODEL)(TEXTS, padding=True, return_tensors="pt")
batch = {**rows, "labels": torch.tensor(LABELS)}
model = load(MODEL)
basis = sg.calibrate(model, [batch], rank=16)
config = sg.peft.SparseGradConfig(basis=basis, support="dense", rank=16, task_type="SEQ_CLS")
model = get_peft_model(model, config)
optimizer = sg.peft.optimizer(model, lr=1e-2)
model.train()
for _ in range(10):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")

with torch.no_grad():
    expected = model.eval()(**rows).logits
    # Rank 16 is that of the cores, so the conversion loses nothing. It holds the head, too.
    save_as_lora("lora", model, rank=16)
    lora = PeftModel.from_pretrained(load(MODEL), "lora").eval()
    print(f"LoRA differs by {(lora(**rows).logits - expected).abs().max():.1e}")

    merged = model.merge_and_unload()  # changes the model, so it comes last
    merged.save_pretrained("merged")
    plain = load("merged")
    print(f"merged differs by {(plain(**rows).logits - expected).abs().max():.1e}")
