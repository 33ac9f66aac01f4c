"""Fine-tune with the Trainer of transformers, stop, and resume from its checkpoint.

python examples/trainer_resume.py [MODEL]     a hub id or a folder; bert-base-uncased by default
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sparsegrad_cli as sg

MODEL = sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased"
TEXTS = ["a fine film", "dull and long", "I loved it", "what a waste of time"] * 8

tokenizer = AutoTokenizer.from_pretrained(MODEL)
data = Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0] * 8})
data = data.map(lambda row: tokenizer(row["text"]), remove_columns="text")
collate = DataCollatorWithPadding(tokenizer)


def adapted(support: str) -> PeftModel:
    """Return a new model with a new adapter, the same in every call."""
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    batches = [collate([data[j] for j in range(i, i + 8)]) for i in range(0, 32, 8)]
    basis = sg.calibrate(model, batches)
    config = sg.peft.SparseGradConfig(basis=basis, support=support, task_type="SEQ_CLS")
    return get_peft_model(model, config)


def trainer(folder: str, support: str) -> Trainer:
    """Return a Trainer that saves a checkpoint every two steps."""
    model = adapted(support)
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = sg.peft.optimizer(model, lr=arguments.learning_rate)
    return Trainer(
        model, arguments, train_dataset=data, data_collator=collate, optimizers=(optimizer, None)
    )


for support in ("static", "refresh"):
    whole = trainer(f"trainer-{support}", support)
    whole.train()
    resumed = trainer(f"trainer-{support}", support)
    resumed.train(resume_from_checkpoint=f"trainer-{support}/checkpoint-2")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    print(f"{support}: the resumed run ends with the same weights: {same}")
