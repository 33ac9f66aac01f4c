"""Find out, by a trial, how a causal language model computes logits from hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError

_PROBE_LOGIT = 50.0  # Highest logit of the trial; every known cap shows at this size.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # Relative to the largest value.
_HALF_TOLERANCE = 0.06  # The same for bfloat16 and float16.


@dataclass(frozen=True)
class LmHead:
    """The function logits = scale (W h + b), then cap tanh(logits / cap), of hidden states h.

    Attributes:
        scale: Factor of the logits; 1 for most models.
        cap: Bound of the logits; None for most models.
        reason: Why the model computes its logits in another way, so that its own forward must be
            used; None if the formula holds.
    """

    scale: float = 1.0
    cap: float | None = None
    reason: str | None = None


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a transformers model that computes hidden states."""
    decoder = model.get_decoder()  # type: ignore[operator]
    assert isinstance(decoder, nn.Module)
    return decoder


def states_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the decoder's last hidden states, (batch, length, hidden).

    No key-value cache is used: with one, transformers would let packed conversations attend to
    each other.

    Args:
        model: A causal language model.
        inputs: Its inputs, each (batch, length).
    """
    decoder = decoder_of(model)
    states: Tensor = decoder(**_accepted_inputs(decoder, inputs), use_cache=False)[0]
    return states


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of the model's own forward, (batch, length, V)."""
    logits: Tensor = model(**_accepted_inputs(model, inputs), use_cache=False).logits
    return logits


def _accepted_inputs(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs without position ids if the module does not accept them."""
    names = inspect.signature(module.forward).parameters.values()
    if any(n.kind is n.VAR_KEYWORD or n.name == "position_ids" for n in names):
        return inputs
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def find_lm_head(model: nn.Module) -> LmHead:
    """Return how a causal language model computes its logits.

    The formula of its configuration is compared with the model's own logits for eight tokens. The
    output of the head is amplified for this, so that a cap shows.

    Raises:
        UsageError: A position attends to later tokens, so the model is not causal.
    """
    captured: dict[str, Tensor] = {}

    def amplify(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        captured["hidden"] = inputs[0]
        captured["amplified"] = output * (_PROBE_LOGIT / output.abs().max().clamp_min(1e-30))
        return captured["amplified"]

    def capture_states(module: nn.Module, inputs: Any, output: Any) -> None:
        captured["states"] = output[0]

    head = model.get_output_embeddings()  # type: ignore[operator]
    hooks = [decoder_of(model).register_forward_hook(capture_states)]
    if isinstance(head, nn.Module):
        hooks.append(head.register_forward_hook(amplify))
    try:
        logits = _probe_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    states = captured["states"]
    if not _close(states[0, :-1], states[1, :-1]):
        raise UsageError(
            f"{type(model).__name__} lets a position see later ones, so it is not a "
            "causal language model",
            where="model.name",
            fix="choose a decoder such as LLaMA, Mistral, Qwen, SmolLM or GPT-2",
        )
    if type(head) is not nn.Linear or "amplified" not in captured:
        return LmHead(reason="its head is not a plain linear layer")
    if captured["hidden"].shape != states.shape or not _close(captured["hidden"], states):
        return LmHead(reason="its head does not read the decoder's last states")
    scale, cap = _configured_scaling(model)
    expected = captured["amplified"].double() * scale
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    if not _close(logits.to(captured["amplified"].dtype), expected):
        return LmHead(reason="it changes its head's output in an unknown way")
    return LmHead(scale, cap)


def check_packing(model: nn.Module) -> None:
    """Check, on a few tokens, that conversations packed into a row do not affect each other.

    Raises:
        UsageError: The hidden states of a packed conversation differ from those of it alone.
    """
    one, other, second = [3, 4, 5], [6, 7, 8], [9, 10, 11, 12]
    rows = torch.tensor([one + second, other + second, second + one])
    places = [*range(3), *range(4)]
    positions = torch.tensor([places, places, [*range(4), *range(3)]])
    with _evaluation_mode(model) as device:
        vocabulary = _vocabulary(model)
        inputs = {"input_ids": (rows % vocabulary).to(device), "position_ids": positions.to(device)}
        states = states_of(model, inputs)
    behind_one, behind_other, alone = states[0, 3:], states[1, 3:], states[2, :4]
    if not (_close(behind_one, behind_other) and _close(behind_one, alone)):
        raise UsageError(
            f"{type(model).__name__} does not keep conversations apart that are packed into a row",
            where="task.chat.packing",
            fix="set task.chat.packing: none",
        )


def _probe_logits(model: nn.Module) -> Tensor:
    """Return the logits of two rows that differ in their last token, (2, 4, V)."""
    with _evaluation_mode(model) as device:
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % _vocabulary(model)
        return logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _vocabulary(model: nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def _configured_scaling(model: nn.Module) -> tuple[float, float | None]:
    """Return scale and cap from the keys that transformers' configurations use for them."""
    config: Any = model.config
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return float(scale), None if cap is None else float(cap)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding errors of many layers."""
    tolerance = _TOLERANCE.get(a.dtype, _HALF_TOLERANCE) * float(b.abs().max())
    return bool(((a.double() - b.double()).abs() <= tolerance).all())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """Disable gradients and dropout in the context; yield the device of the model's input."""
    modes = [(module, module.training) for module in model.modules()]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    try:
        model.eval()
        with torch.no_grad():
            yield embeddings.weight.device
    finally:
        for module, training in modes:
            module.training = training
