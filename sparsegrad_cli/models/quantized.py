"""Frozen layers in 8 or 4 bits. This is the only module that uses bitsandbytes.

8 bits (Dettmers et al. 2022, arXiv 2208.07339): one scale per row of W. 4 bits (Dettmers et al.
2023, arXiv 2305.14314): NF4 with one scale per 64 entries, and the scales themselves in 8 bits. The
linear layers of the model's blocks are quantized; embeddings, norms, poolers and heads are not.

In 8 bits, bitsandbytes' own layers save x for the backward pass. In evaluation they compute
something else than in training (8 bits on the CPU: x is rounded to int8; 4 bits on CPUs with
bfloat16 units: W is repacked). The layers of a loaded model are therefore called through
:func:`sparsegrad_cli.numerics.frozen_linear.frozen_linear`, which saves nothing. On CUDA, products
use bitsandbytes' kernels. On the CPU, W is dequantized for each product, as in its own training.
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
from sparsegrad_cli.recipe.optimizers import INSTALL_BITSANDBYTES


def require_bitsandbytes() -> None:
    """Check that bitsandbytes is installed.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "bitsandbytes, which holds weights in 8 or 4 bits, is not installed",
            where="model.quantization",
            fix=f"{INSTALL_BITSANDBYTES}, or leave model.quantization out",
        )


def quantization_config(bits: str, dtype: torch.dtype, skipped: Sequence[str]) -> Any:
    """Return transformers' BitsAndBytesConfig.

    Args:
        bits: ``8bit`` or ``4bit``.
        dtype: Dtype of products.
        skipped: Full names of the linear layers that are not quantized.
    """
    from transformers import BitsAndBytesConfig

    # Match whole names: a bare name would also match the end of others.
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
    """Return the arguments of BitsAndBytesConfig that quantize a model in the same way."""
    config: Any = model.config
    made = config.quantization_config.to_dict()
    names = ["load_in_8bit", "load_in_4bit"]
    if made["load_in_4bit"]:
        names += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"]
    return {name: made[name] for name in (*names, "llm_int8_skip_modules") if made[name]}


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a layer of bitsandbytes with an 8-bit or 4-bit weight."""
    bnb = sys.modules.get("bitsandbytes")  # It is imported if a model has such a layer.
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)


def find_quantized(module: nn.Module) -> nn.Module | None:
    """Return the module, or its ``base_layer`` (of peft's or our layers), if it is quantized."""
    held = getattr(module, "base_layer", module)
    return held if is_quantized(held) else None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantized layers by their names in the plain model, without ``base_layer``."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            found[name.removesuffix(".base_layer")] = module
    return found


def move_model(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a model to a device. A model with quantized layers was built there and is unchanged."""
    return model if quantized_layers(model) else model.to(device)


def bits_of(model: nn.Module) -> str | None:
    """Return ``8bit`` or ``4bit``, or None for a model without quantized layers."""
    layer = next(iter(quantized_layers(model).values()), None)
    if layer is None:
        return None
    return "4bit" if hasattr(layer.weight, "quant_state") else "8bit"


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of a linear layer's products: its weight's, before quantization."""
    layer: Any = find_quantized(module)
    if layer is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.dtype
    state = getattr(layer.weight, "quant_state", None)
    found: torch.dtype = state.dtype if state is not None else layer.frozen_dtype
    return found


def dequantized(module: nn.Module) -> Tensor:
    """Return W (out, in) of a quantized layer in the dtype of its products, a new tensor."""
    import bitsandbytes as bnb

    layer: Any = find_quantized(module)
    assert layer is not None
    if isinstance(layer, bnb.nn.Linear4bit):
        packed, state = layer.weight.data, copy.copy(layer.weight.quant_state)
        sides, state.shape = state.shape, torch.Size((1, entries(layer.weight)))
        # As one long row: on the CPU, 0.50.2 uses wrong scales if a row ends inside a block.
        made: Tensor = bnb.functional.dequantize_4bit(packed, state).view(sides)
        return made
    codes_OI: Tensor = layer.weight.data
    scale_O = _row_scales(layer)
    # Codes are exact in all of these dtypes, so each entry is rounded once.
    return codes_OI.to(dtype_of(layer)).mul_((scale_O * (1 / 127))[:, None])


def _row_scales(layer: Any) -> Tensor:
    """Return the scales (out,) of an 8-bit layer; they move to its state on first use."""
    found: Tensor = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return found


def entries(parameter: Tensor) -> int:
    """Return the number of entries of a parameter, before 4-bit values were packed into bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def count_entries(model: nn.Module) -> int:
    """Return the number of entries of all parameters, packed or not."""
    return sum(entries(parameter) for parameter in model.parameters())


def quantization_state(model: nn.Module) -> Iterator[Tensor]:
    """Yield the scales and code books, which are weights but not parameters."""
    for layer in quantized_layers(model).values():
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is None:
            yield _row_scales(layer)
            continue
        for part in filter(None, (state, state.state2)):  # The scales may be quantized, too.
            yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def rounds_in_evaluation(model: nn.Module, device: torch.device) -> bool:
    """Return whether bitsandbytes' own layers give other results in evaluation than in training.

    In 8 bits, x is rounded to int8. In 4 bits, on CPUs with bfloat16 units, x and the scales are
    rounded to bfloat16.
    """
    if bits_of(model) == "8bit":
        return True
    layers = quantized_layers(model).values() if device.type == "cpu" else ()
    return any(getattr(each, "support_avx512bf16_for_cpu", False) for each in layers)


def record_dtype(model: nn.Module) -> None:
    """Record the dtype of products on quantized layers that another library has loaded.

    An 8-bit layer does not hold it: it is that of the model's other parameters.
    """
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, torch.get_default_dtype())
    for layer in quantized_layers(model).values():
        if not hasattr(layer, "frozen_dtype"):
            layer.frozen_dtype = dtype  # type: ignore[assignment]


def use_frozen_forward(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Let quantized layers always compute as in training, without saved activations.

    Args:
        model: The model, changed in place.
        dtype: Dtype of products, for layers that do not hold it; None keeps what
            :func:`record_dtype` has found.

    Returns:
        The number of quantized layers.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        if dtype is not None:
            layer.frozen_dtype = dtype  # type: ignore[assignment]
        # Set on the instance: a wrapper module would rename the parameters.
        layer.forward = functools.partial(_forward, layer)
    if layers:
        _hide_rounding_warning()
    return len(layers)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    product = functools.partial(_product, layer)
    return frozen_linear(x, product, functools.partial(dequantized, layer))


def _product(layer: Any, x_NI: Tensor) -> Tensor:
    """Return x W' + b, (N, out), for x (N, in). It is called without autograd."""
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
    """Hide the warning at every 8-bit product that x is rounded to float16."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if _is_not_about_rounding not in logger.filters:
        logger.addFilter(_is_not_about_rounding)


def _is_not_about_rounding(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# On CPUs with bfloat16 units, its import warns of a kernel that is not used here. peft may import
# it in any run.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_kernels)
