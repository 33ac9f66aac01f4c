"""Fine-tune a classifier by LoRA with transformers' Trainer and PEFT.

python benchmarks/plain/trainer_lora.py MODEL DATA OUT --epochs 3 --learning-rate 2e-3 [--bf16]

DATA holds train.csv and validation.csv with the columns text, label and perhaps text_pair.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import peft
from datasets import load_dataset
from sklearn.metrics import matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

RANK = 3


def model_of(name: str, labels: int) -> Any:
    """Return a classifier with LoRA beside the two layers of every MLP."""
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=r".*\.\d+\.(intermediate|output)\.dense",
    )
    return peft.get_peft_model(model, config)


def scores(prediction: Any) -> dict[str, float]:
    """Return Matthews correlation and accuracy."""
    found = np.argmax(prediction.predictions, axis=-1)
    return {
        "matthews_correlation": float(matthews_corrcoef(prediction.label_ids, found)),
        "accuracy": float((prediction.label_ids == found).mean()),
    }


def main() -> None:
    """Train, evaluate after every epoch, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = {split: f"{args.data}/{split}.csv" for split in ("train", "validation")}
    data = load_dataset("csv", data_files=files, keep_default_na=False)
    columns = [name for name in ("text", "text_pair") if name in data["train"].column_names]

    def tokenize(rows: Any) -> Any:
        return tokenizer(*(rows[c] for c in columns), truncation=True, max_length=args.max_length)

    data = data.map(tokenize, batched=True)
    trainer = Trainer(
        model_of(args.model, len(set(data["train"]["label"]))),
        TrainingArguments(
            args.out,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            max_grad_norm=0.0,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            bf16=args.bf16,
            use_cpu=True,
            seed=42,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
    )
    trainer.train()
    trainer.save_model(args.out)
    print(trainer.state.log_history[-2])


if __name__ == "__main__":
    main()
