"""Frozen linear layers with a trainable core beside them: W + Q_out S Q_in'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsegrad_cli.models.quantized import dtype_of
from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.frozen_linear import core_beside
from sparsegrad_cli.numerics.hosvd import Basis


class CoreLinear(nn.Module):
    """A frozen linear layer with a trainable core beside it: W + Q_out S Q_in'.

    Args:
        weight: the frozen parameter of the layer it replaces: (out, in), or its transpose.
        bias: its bias parameter or None.
        basis: truncated bases; buffers outside the state dict.
        support: (k,) flat positions in S (below 2^31) that train; None trains all of S.
        transposed: the weight holds W'.
    """

    q_out: Tensor
    q_in: Tensor
    support: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        basis: Basis,
        support: Tensor | None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._make_core(basis, support, weight.dtype, weight.device)

    def _make_core(
        self, basis: Basis, support: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.register_buffer("q_out", basis.q_out, persistent=False)
        self.register_buffer("q_in", basis.q_in, persistent=False)
        self.static = support is not None
        self.shape = (basis.q_out.shape[1], basis.q_in.shape[1])
        # The core is float32 or wider whatever the weight is: small increments must not be lost.
        dtype = torch.promote_types(dtype, torch.float32)
        if support is None:
            self.core = nn.Parameter(torch.zeros(self.shape, dtype=dtype, device=device))
        else:
            # Persistent: values without their positions are useless. Four bytes each.
            self.register_buffer("support", support.to(device, torch.int32))
            zeros = torch.zeros(len(support), dtype=dtype, device=device)
            self.values = nn.Parameter(zeros)

    def core_RS(self) -> Tensor:
        """Return S, (r_out, r_in)."""
        if "core" in self._parameters:
            return self.core
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.support,), self.values).view(self.shape)

    @property
    def trained(self) -> nn.Parameter:
        """The parameter that holds S or its values."""
        return self.core if "core" in self._parameters else self.values

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; that of the plain layer while S is zero."""
        weight = self.weight.T if self.transposed else self.weight
        return core_linear(x, weight, self.bias, self.core_RS(), self.q_out, self.q_in)


class QuantizedCoreLinear(CoreLinear):
    """A core beside a quantized layer, which makes its product itself.

    Args:
        base_layer: a layer of bitsandbytes that saves nothing
            (:func:`sparsegrad_cli.models.quantized.use_frozen_forward`); it is kept whole, because
            it holds the scales.
        basis, support: as in :class:`CoreLinear`.
    """

    def __init__(self, base_layer: nn.Module, basis: Basis, support: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.transposed = base_layer, False
        device = next(base_layer.parameters()).device
        self._make_core(basis, support, dtype_of(base_layer), device)

    # Under the plain layer's attribute names, which are not parameters of this module.
    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in ("weight", "bias"):
            found: Tensor | nn.Module = getattr(self.base_layer, name)
            return found
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; that of the quantized layer while S is zero."""
        return core_beside(x, self.base_layer, self.core_RS(), self.q_out, self.q_in)
