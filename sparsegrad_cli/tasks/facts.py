"""What run.json says of model and data, once they are loaded."""

from __future__ import annotations

from typing import Any

from sparsegrad_cli.models.quantized import count_entries
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.tasks.setup import Setup, hash_facts


def loaded_facts(recipe: Recipe, setup: Setup) -> dict[str, Any]:
    """The blocks ``model``, ``task``, ``precision`` and ``hashes``."""
    config: Any = setup.model.config
    task = setup.task
    return {
        "model": {
            "name": recipe.model.name,
            "architecture": type(setup.model).__name__,
            "model_type": getattr(config, "model_type", None),
            "parameters": count_entries(setup.model),
            "dtype": recipe.model.dtype,
            "quantization": recipe.model.quantization,
            "fingerprint": setup.fingerprint,
            "head": setup.head.to_json() if setup.head else None,
            "not_adapted": [
                {"kind": n.kind, "shape": list(n.shape), "count": n.count}
                for n in setup.not_adapted
            ],
        },
        "task": {
            "name": task.name,
            "kind": task.kind,
            "metric": setup.objective.metric,
            "regression": task.kind == "regression",
            "label_names": list(task.label_names) if task.label_names else None,
            "positive_label": task.positive_label,
            "train_examples": len(setup.train_data),
            "validation_examples": {k: len(v) for k, v in setup.validation.items()},
            "majority_score": task.majority.get(setup.objective.metric),
            "majority_accuracy": task.majority.get("accuracy"),
            "max_length": recipe.task.max_length,
            "padding": recipe.task.padding,
            "notes": list(task.notes),
            "counts": dict(task.counts),
        },
        "precision": setup.precision,
        "hashes": {
            "data": task.data_hash,
            "head_init": setup.head_hash,
            "precision": hash_facts(setup.precision),
            "order": {},
        },
    }
