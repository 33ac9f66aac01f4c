"""Frozen layers in 8 or 4 bits: what is known here of bitsandbytes, and nowhere else.

8 bits (Dettmers et al. 2022, arXiv 2208.07339): one scale a row of W. 4 bits (Dettmers et al. 2023,
arXiv 2305.14314): NF4, one scale for 64 entries, the scales themselves in 8 bits. Quantized are the
linear layers of the model's blocks; embeddings, norms, poolers and heads stay as they are.

bitsandbytes' own layers keep x for the backward pass in 8 bits, and compute in evaluation something
else than in training (8 bits on the CPU: x rounded to int8; 4 bits on CPUs with bfloat16 units: W
packed anew). The layers of a loaded model are therefore called through
:func:`sparsegrad_cli.numerics.frozen_linear.frozen_linear`, which keeps nothing. Products are those
of bitsandbytes' kernels on CUDA; on the CPU, as in its own training, W is dequantized for one.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.numerics.frozen_linear import frozen_linear
from sparsegrad_cli.recipe.quantization import INSTALL


def require_bitsandbytes() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "bitsandbytes is not installed, which holds weights in 8 or 4 bits",
            where="model.quantization",
            fix=f"{INSTALL}, or leave model.quantization out",
        )


def quantization_config(bits: str, dtype: torch.dtype, skipped: Sequence[str]) -> Any:
    """Return transformers' BitsAndBytesConfig.

    Args:
        bits: ``8bit`` or ``4bit``.
        dtype: of products.
        skipped: full names of the linear layers that stay as they are.
    """
    from transformers import BitsAndBytesConfig

    # Whole names: a bare one would also match the end of others.
    patterns = [f"{re.escape(name)}$" for name in skipped]
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=patterns)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=patterns,
    )


def quantization_arguments(model: nn.Module) -> dict[str, Any]:
    """What a user tells BitsAndBytesConfig to quantize the base model as this one is."""
    config: Any = model.config
    made = config.quantization_config.to_dict()
    names = ["load_in_8bit", "load_in_4bit"]
    if made["load_in_4bit"]:
        names += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"]
    return {name: made[name] for name in (*names, "llm_int8_skip_modules") if made[name]}


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes that holds its weight in 8 or 4 bits."""
    bnb = sys.modules.get("bitsandbytes")  # whoever has such a layer has imported it
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)


def find_quantized(module: nn.Module) -> nn.Module | None:
    """The quantized layer that a module is, or holds as ``base_layer`` (peft's, a core's)."""
    held = getattr(module, "base_layer", module)
    return held if is_quantized(held) else None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All of them by name; what holds one counts by its own name too, as in the plain model."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            found[name.removesuffix(".base_layer")] = module
    return found


def move_model(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on a device; one with quantized layers was made there, and cannot be moved."""
    return model if quantized_layers(model) else model.to(device)


def bits_of(model: nn.Module) -> str | None:
    """``8bit`` or ``4bit``, as its quantized layers are held; None where it has none."""
    layer = next(iter(quantized_layers(model).values()), None)
    if layer is None:
        return None
    return "4bit" if hasattr(layer.weight, "quant_state") else "8bit"


def dtype_of(module: nn.Module) -> torch.dtype:
    """In which a linear layer's products are made: its weight's dtype, or what it was made for."""
    layer: Any = find_quantized(module)
    if layer is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.dtype
    state = getattr(layer.weight, "quant_state", None)
    found: torch.dtype = state.dtype if state is not None else layer.frozen_dtype
    return found


def dequantized(module: nn.Module) -> Tensor:
    """W (out, in) of a quantized layer, in the dtype of its products; made anew at each call."""
    import bitsandbytes as bnb

    layer: Any = find_quantized(module)
    assert layer is not None
    if isinstance(layer, bnb.nn.Linear4bit):
        packed, state = layer.weight.data, copy.copy(layer.weight.quant_state)
        sides, state.shape = state.shape, torch.Size((1, entries(layer.weight)))
        # As one long row: on the CPU, 0.50.2 takes wrong scales where a row ends inside a block.
        made: Tensor = bnb.functional.dequantize_4bit(packed, state).view(sides)
        return made
    codes_OI: Tensor = layer.weight.data
    scale_O = _row_scales(layer)
    # Codes are exact in any of the dtypes; each entry is rounded once.
    return codes_OI.to(dtype_of(layer)).mul_((scale_O * (1 / 127))[:, None])


def _row_scales(layer: Any) -> Tensor:
    """Of an 8-bit layer: with its weight at first, with its state once it has been used."""
    found: Tensor = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return found


def entries(parameter: Tensor) -> int:
    """Entries of the matrix that a parameter holds, also where two lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def count_entries(model: nn.Module) -> int:
    """Entries of all of a model's parameters, packed or not."""
    return sum(entries(parameter) for parameter in model.parameters())


def quantization_state(model: nn.Module) -> Iterator[Tensor]:
    """Scales and code books beside the parameters: weights, for whoever counts bytes."""
    for layer in quantized_layers(model).values():
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is None:
            yield _row_scales(layer)
            continue
        for part in filter(None, (state, state.state2)):  # scales that are themselves quantized
            yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def rounds_in_evaluation(model: nn.Module, device: torch.device) -> bool:
    """Whether bitsandbytes' own layers would evaluate otherwise than these are trained.

    8 bits: x is rounded to int8. 4 bits, on CPUs with bfloat16 units: x and the scales to bfloat16.
    """
    if bits_of(model) == "8bit":
        return True
    layers = quantized_layers(model).values() if device.type == "cpu" else ()
    return any(getattr(each, "support_avx512bf16_for_cpu", False) for each in layers)


def use_frozen_forward(model: nn.Module, dtype: torch.dtype) -> int:
    """Let quantized layers compute as in training always, and keep nothing; returns how many.

    Args:
        dtype: of products, where the layer does not say it.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        layer.frozen_dtype = dtype  # type: ignore[assignment]
        # On the instance, as elsewhere: a wrapper module would rename parameters.
        layer.forward = functools.partial(_forward, layer)
    if layers:
        _hide_rounding_warning()
    return len(layers)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    product = functools.partial(_product, layer)
    return frozen_linear(x, product, functools.partial(dequantized, layer))


def _product(layer: Any, x_NI: Tensor) -> Tensor:
    """x W' + b; called where autograd does not look."""
    import bitsandbytes as bnb

    bias = None if layer.bias is None else layer.bias.to(x_NI.dtype)
    if x_NI.device.type == "cpu":
        return F.linear(x_NI, dequantized(layer).to(x_NI.dtype), bias)
    weight = layer.weight
    made: Tensor
    if isinstance(layer, bnb.nn.Linear4bit):
        made = bnb.matmul_4bit(x_NI, weight.data, quant_state=weight.quant_state, bias=bias)
    else:
        if weight.CB is not None:
            layer.init_8bit_state()
        made = bnb.matmul(x_NI, weight, bias=bias, state=layer.state)
    return made


def _hide_rounding_warning() -> None:
    """bitsandbytes warns at every 8-bit product of anything but float16 that it rounds x."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_of_rounding not in logger.filters:
        logger.addFilter(_not_of_rounding)


def _not_of_rounding(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def _not_of_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# Said at its import, which peft may do in any run, on CPUs with units for bfloat16: of a kernel
# that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_of_kernels)
