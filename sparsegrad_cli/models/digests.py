"""Digests of tensors: which weights a file holds, or belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.models.quantized import quantization_state
from sparsegrad_cli.models.targets import Target, head_parameters

_SAMPLED = 4096  # Values of each weight in a fingerprint.


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 (hex) of names, shapes, dtypes and bytes, in the order given."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy())  # NumPy has no bfloat16.
    return sha.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters, buffers and scales of quantized layers."""
    scales = ((f"scale {n}", scale) for n, scale in enumerate(quantization_state(model)))
    return tensors_digest((*model.named_parameters(), *model.named_buffers(), *scales))


def fingerprint(model: nn.Module, targets: Sequence[Target]) -> str:
    """Return the SHA-256 (hex) of the targets' names, shapes and a sample of their weights.

    Evenly spaced values of each weight distinguish models without reading gigabytes.
    """
    sha = hashlib.sha256()
    for target in targets:
        sha.update(f"{target.name} {target.out_features} {target.in_features}".encode())
        sha.update(_sample(target.weight_OI(model)))
    return sha.hexdigest()


def body_digest(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of names, shapes and samples of all parameters but the head's.

    Unlike :func:`fingerprint` it does not depend on the choice of target modules.
    """
    sha, head = hashlib.sha256(), head_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in head:
            sha.update(f"{name} {tuple(parameter.shape)}".encode())
            sha.update(_sample(parameter))
    return sha.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """Return evenly spaced values of a tensor as the bytes of float32."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // _SAMPLED)
    sample = flat[::stride][:_SAMPLED].to("cpu", torch.float32).contiguous()
    return bytes(sample.numpy().tobytes())


def parameters_digest(parameters: Mapping[str, nn.Parameter]) -> str:
    """Return the SHA-256 (hex) of the names and of the values in float32, in the names' order."""
    sha = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        sha.update(name.encode())
        sha.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()
