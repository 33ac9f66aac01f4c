"""Build the models and methods that benchmarks measure: real shapes and random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.full.settings import FullSettings
from sparsegrad_cli.methods.lora.settings import LoraSettings
from sparsegrad_cli.methods.meprop.settings import MepropSettings
from sparsegrad_cli.methods.sparsegrad.settings import SparsegradSettings
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis, by_columns
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import GLUE_TASKS

# name -> (model_type of transformers, settings that differ from its defaults). The weights are
# random, because time and memory depend only on shapes.
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "shapes:bert-base": ("bert", {}),
    "shapes:roberta-large": (
        "roberta",
        {
            "vocab_size": 50265,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
        },
    ),
    "shapes:smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "pad_token_id": 0,
        },
    ),
}


def model_of(name: str) -> nn.Module:
    """Return a classifier: a recipe's model, or one of ``SHAPES`` with random weights."""
    if name not in SHAPES:
        return load_classifier(ModelSection(name=name), GLUE_TASKS["cola"], seed=0).model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model_type, settings = SHAPES[name]
    config = AutoConfig.for_model(model_type, num_labels=2, **settings)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def batch_of(batch: int, length: int) -> dict[str, Tensor]:
    """Return token ids without padding, and labels."""
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def random_bases(targets: list[Target], rank: int | None = None) -> dict[str, Basis]:
    """Return random orthonormal bases, since time and memory do not depend on their content."""

    def columns(size: int) -> Tensor:
        kept = size if rank is None else min(rank, size)
        return by_columns(torch.linalg.qr(torch.randn(size, kept)).Q)

    return {
        t.name: Basis(q_out, q_in, *(torch.linspace(1, 0, q.shape[1]) for q in (q_out, q_in)))
        for t in targets
        for q_out, q_in in [(columns(t.out_features), columns(t.in_features))]
    }


def methods_at(
    density: float, rank: int
) -> dict[str, FullSettings | LoraSettings | MepropSettings | SparsegradSettings]:
    """Return all methods with equal trainable parameters; ``rank`` is that of the core form."""

    def sparsegrad(form: str, **more: object) -> SparsegradSettings:
        settings = {"name": "sparsegrad", "density": density, "form": form, **more}
        return SparsegradSettings.model_validate(settings)

    return {
        "lora": LoraSettings(name="lora", density=density),
        "lora recomputed": LoraSettings(name="lora", density=density, recompute="activation"),
        "full": FullSettings(name="full"),
        "full recomputed": FullSettings(name="full", recompute="activation"),
        "meprop entries": MepropSettings(name="meprop", density=density),
        "core": sparsegrad("core", support="static", rank=rank),
        "core dense": sparsegrad("core", support="dense", rank=rank),
        "core recomputed": sparsegrad("core", support="static", rank=rank, recompute="activation"),
        "materialized": sparsegrad("materialized"),
        "rotated": sparsegrad("rotated"),
    }
