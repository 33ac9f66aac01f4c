"""What calibration and training begin with: task, tokenizer, model, targets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.data.collate import ensure_pad_token, make_collator, tokenize
from sparsegrad_cli.data.loading import LoadedTask, load_task
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.modeling.loading import load_classifier, load_tokenizer
from sparsegrad_cli.modeling.targets import Target, find_targets, fingerprint, head_parameters
from sparsegrad_cli.observer import Observer
from sparsegrad_cli.recipe.loading import LoadedRecipe
from sparsegrad_cli.recipe.method_section import LoraMethod, SparsegradMethod
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.training.order import EpochSampler


@dataclass
class Setup:
    """A recipe made real, before any method has touched the model."""

    task: LoadedTask
    train_data: Any
    validation: dict[str, Any]
    tokenizer: Any
    collator: Any
    model: nn.Module
    targets: list[Target]
    fingerprint: str
    head_hash: str
    device: torch.device


def make_setup(loaded: LoadedRecipe, observer: Observer) -> Setup:
    """Load everything a recipe names.

    Raises:
        SparsegradError: of the kind that fits; see the loaders.
    """
    recipe = loaded.recipe
    check_precision(loaded)
    section = recipe.task
    columns = section.columns.model_dump(exclude_none=True) if section.columns else None
    task = load_task(
        section.name,
        path=section.path,
        columns=columns,
        train_limit=section.train_limit,
        eval_limit=section.eval_limit,
        validation_fraction=section.validation_fraction,
        metric=section.metric,
        # Not the run's seed: seeds of a comparison must be scored on the same validation rows.
        seed=0,
    )
    for note in task.notes:
        observer.note(note)
    tokenizer = load_tokenizer(recipe.model)
    model = load_classifier(recipe.model, task.spec, recipe.seed)
    padding_note = ensure_pad_token(tokenizer, model.config)
    if padding_note:
        observer.note(padding_note)
    max_length = fitting_length(recipe, model.config, observer)
    train_data, validation = tokenize(
        task, tokenizer, max_length=max_length, padding=section.padding
    )
    targets = find_targets(model, recipe.targets)
    device = _device(recipe)
    head_hash = hash_parameters(head_parameters(model))
    return Setup(
        task,
        train_data,
        validation,
        tokenizer,
        make_collator(tokenizer, max_length=max_length, padding=section.padding),
        model.to(device),
        targets,
        fingerprint(model, targets),
        head_hash,
        device,
    )


def check_precision(loaded: LoadedRecipe) -> None:
    """Small increments vanish in half-precision weights: only frozen ones may have it."""
    recipe, method = loaded.recipe, loaded.recipe.method
    beside = isinstance(method, LoraMethod) or (
        isinstance(method, SparsegradMethod) and method.form == "core"
    )
    if recipe.model.dtype != "float32" and not (beside and recipe.scope == "head"):
        raise UsageError(
            f"method {recipe.method.name} trains the model's own weights, and small increments are "
            f"lost in {recipe.model.dtype}",
            where=loaded.where("model.dtype"),
            fix="model.dtype: float32 with train.bf16: true computes in bf16 and keeps the "
            "weights; lora and sparsegrad's form: core leave the weights alone",
        )


def fitting_length(recipe: Recipe, config: Any, observer: Observer) -> int:
    """task.max_length, or less where the model has fewer positions."""
    positions = getattr(config, "max_position_embeddings", None)
    offset = (
        2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    )
    wanted = recipe.task.max_length
    if isinstance(positions, int) and positions > 0 and wanted > positions - offset:
        observer.note(f"max_length {wanted} cut to the model's {positions - offset} positions")
        return positions - offset
    return wanted


def _device(recipe: Recipe) -> torch.device:
    if recipe.train.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def hash_parameters(parameters: Mapping[str, nn.Parameter]) -> str:
    """sha256 (hex) of names and values."""
    sha = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        sha.update(name.encode())
        sha.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def calibration_batches(setup: Setup, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless random batches of the training data on the model's device, epoch after epoch."""
    columns = [c for c in setup.train_data.column_names if c in _MODEL_INPUTS]
    data = setup.train_data.select_columns(columns)
    sampler = EpochSampler(data, seed=seed, strategy="random")
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), batch_size):
            rows = [data[i] for i in order[start : start + batch_size]]
            yield to_device(setup.collator(rows), setup.device)
        epoch += 1


_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch, on a device."""
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
