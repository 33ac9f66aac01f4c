"""Train on two processes with accelerate.

torchrun --nproc_per_node 2 examples/two_processes.py [MODEL]

`accelerate launch` works as well, with a configuration of two processes.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased"
TEXTS = ["a fine film", "dull and long", "I loved it", "what a waste of time"] * 8

accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
encoded = tokenizer(TEXTS, padding=True)
rows = [
    {**{k: torch.tensor(v[i]) for k, v in encoded.items()}, "labels": torch.tensor(1 - i % 2)}
    for i in range(len(TEXTS))
]
# The same bases on every process: the same batches, before the data is split.
basis = sg.calibrate(model, DataLoader(rows, batch_size=8))
config = sg.peft.SparseGradConfig(basis=basis, support="dynamic", task_type="SEQ_CLS")
model = get_peft_model(model, config)
optimizer = sg.peft.optimizer(model, lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))

for batch in loader:
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()

trained = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
gathered = accelerator.gather(trained).view(accelerator.num_processes, -1)
same = bool((gathered == gathered[0]).all())
accelerator.print(f"{accelerator.num_processes} processes end with the same weights: {same}")
accelerator.unwrap_model(model).save_pretrained(
    "two-processes", is_main_process=accelerator.is_main_process
)
accelerator.end_training()
