"""Initialize LoRA from batches of the run: EVA, CorDA and LoRA-GA, by PEFT's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import TrainingData
from sparsegrad_cli.models.unpadding import with_padding


def initialize_before(model: nn.Module, config: Any, training: TrainingData | None) -> None:
    """Give the plain model what CorDA (2406.05223) or LoRA-GA (2407.05000) measures on batches."""
    init = getattr(config, "init_lora_weights", None)
    if training is None or init not in ("corda", "lora_ga"):
        return
    was_training = model.training
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, _forward_each(model, training))
    else:
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, _backward(training))
    model.train(was_training)
    model.zero_grad(set_to_none=True)


def initialize_after(wrapped: Any, config: Any, training: TrainingData | None) -> None:
    """Fill A with the right singular vectors of the inputs (EVA, 2410.07170)."""
    if training is None or getattr(config, "init_lora_weights", None) != "eva":
        return
    from peft import initialize_lora_eva_weights

    batches = list(training.batches())
    was_training = wrapped.training
    with with_padding(wrapped):  # EVA picks the real tokens itself, by row and position.
        initialize_lora_eva_weights(
            wrapped,
            dataloader=batches,
            prepare_model_inputs_fn=_positions,
            gather_distributed_inputs=False,  # every process reads the same batches
            show_progress_bar=False,
        )
    wrapped.train(was_training)


def _positions(inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """Return the positions of the tokens that count, (tokens, 2) int64: padding does not."""
    mask = inputs.get("attention_mask")
    return torch.nonzero(torch.ones_like(inputs["input_ids"]) if mask is None else mask)


def _forward_each(model: nn.Module, training: TrainingData) -> Callable[[], None]:
    """Return a function that runs every example alone: CorDA reads the inputs as a matrix."""

    def run() -> None:
        for example in _examples(training):
            model(**example)

    return run


def _examples(training: TrainingData) -> Iterator[dict[str, Tensor]]:
    """Yield every example without its padding, as a batch of one."""
    for batch in training.batches():
        for row in range(len(batch["input_ids"])):
            example = {k: v[row : row + 1] for k, v in batch.items() if k != "labels"}
            mask = example.get("attention_mask")
            if mask is not None:
                kept = mask[0].bool()
                width = mask.shape[1]
                example = {
                    k: v[:, kept] if v.ndim == 2 and v.shape[1] == width else v
                    for k, v in example.items()
                }
            yield example


def _backward(training: TrainingData) -> Callable[[], None]:
    """Return a function that adds up the gradients of all batches."""

    def run() -> None:
        for batch in training.batches():
            training.loss(batch).backward()

    return run
