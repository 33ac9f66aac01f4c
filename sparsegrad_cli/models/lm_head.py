"""How a causal language model makes logits of its decoder's hidden states, found out by trying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import UsageError

_PROBE_LOGIT = 50.0  # highest logit of the trial: enough for any cap to show
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative to the largest; else .06


@dataclass(frozen=True)
class LmHead:
    """logits = scale (W h + b), capped to cap tanh(logits / cap), h the decoder's last states.

    Attributes:
        scale, cap: as above; 1 and None for most models.
        reason: why that does not hold for this model, so that its own logits must be used.
    """

    scale: float = 1.0
    cap: float | None = None
    reason: str | None = None


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model of transformers that gives hidden states."""
    decoder = model.get_decoder()  # type: ignore[operator]
    assert isinstance(decoder, nn.Module)
    return decoder


def states_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The decoder's last hidden states (batch, length, hidden).

    Without a cache, which nothing here reads, and with which transformers would let packed
    conversations see each other.
    """
    decoder = decoder_of(model)
    states: Tensor = decoder(**_accepted_inputs(decoder, inputs), use_cache=False)[0]
    return states


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own logits (batch, length, V)."""
    logits: Tensor = model(**_accepted_inputs(model, inputs), use_cache=False).logits
    return logits


def _accepted_inputs(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without position ids where a model has no use for them."""
    names = inspect.signature(module.forward).parameters.values()
    if any(n.kind is n.VAR_KEYWORD or n.name == "position_ids" for n in names):
        return inputs
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def find_lm_head(model: nn.Module) -> LmHead:
    """What a causal language model does between hidden states and logits.

    What its configuration says is tried on eight tokens, with the head's output made so large that
    a cap must show.

    Raises:
        UsageError: an earlier position sees a later token: no causal language model.
    """
    captured: dict[str, Tensor] = {}

    def amplify(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        captured["hidden"] = inputs[0]
        captured["amplified"] = output * (_PROBE_LOGIT / output.abs().max().clamp_min(1e-30))
        return captured["amplified"]

    def listen(module: nn.Module, inputs: Any, output: Any) -> None:
        captured["states"] = output[0]

    head = model.get_output_embeddings()  # type: ignore[operator]
    hooks = [decoder_of(model).register_forward_hook(listen)]
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
            f"{type(model).__name__} lets a position see later ones: no causal language model",
            where="model.name",
            fix="a decoder such as LLaMA, Mistral, Qwen, SmolLM or GPT-2",
        )
    if type(head) is not nn.Linear or "amplified" not in captured:
        return LmHead(reason="its head is no plain linear layer")
    if captured["hidden"].shape != states.shape or not _close(captured["hidden"], states):
        return LmHead(reason="its head reads something else than the decoder's last states")
    scale, cap = _configured_scaling(model)
    expected = captured["amplified"].double() * scale
    expected = expected if cap is None else cap * torch.tanh(expected / cap)
    if not _close(logits.to(captured["amplified"].dtype), expected):
        return LmHead(reason="it changes its head's output in a way that is not known here")
    return LmHead(scale, cap)


def check_packing(model: nn.Module) -> None:
    """Prove, on a few tokens, that conversations packed into a row do not see each other.

    Raises:
        UsageError: they do, or they are not what they are alone.
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
            where="task.packing",
            fix="do without packing",
        )


def _probe_logits(model: nn.Module) -> Tensor:
    """Logits of two rows that differ in their last token."""
    with _evaluation_mode(model) as device:
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % _vocabulary(model)
        return logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _vocabulary(model: nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[0])


def _configured_scaling(model: nn.Module) -> tuple[float, float | None]:
    """Scale and cap by the names that configurations of transformers have for them."""
    config: Any = model.config
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return float(scale), None if cap is None else float(cap)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding errors that many layers have added to."""
    tolerance = _TOLERANCE.get(a.dtype, 0.06) * float(b.abs().max())
    return bool(((a.double() - b.double()).abs() <= tolerance).all())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """No gradients and no dropout inside; gives the device of the model's input."""
    modes = [(module, module.training) for module in model.modules()]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    try:
        model.eval()
        with torch.no_grad():
            yield embeddings.weight.device
    finally:
        for module, training in modes:
            module.training = training
