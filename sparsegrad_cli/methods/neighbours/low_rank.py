"""W replaced by a product of two factors that train: the layer and what its methods share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegrad_cli.methods.implementation import Adapted, Method, load_by_name
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.core_linear import product_dtype
from sparsegrad_cli.numerics.hosvd import Basis


class FactoredLinear(nn.Module):
    """A linear layer whose weight is a product: y = (x A') B' + b.

    Args:
        b_OR, a_RI: B (out, r) and A (r, in), float32 or wider; they become parameters.
        bias: the bias of the layer that it replaces.
        transposed: whether that layer held W'.
    """

    def __init__(
        self, b_OR: Tensor, a_RI: Tensor, bias: nn.Parameter | None, *, transposed: bool
    ) -> None:
        super().__init__()
        self.b, self.a, self.bias = nn.Parameter(b_OR), nn.Parameter(a_RI), bias
        self.transposed = transposed

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def weight(self) -> Tensor:
        """B A as the plain layer would hold it."""
        weight_OI = self.b @ self.a  # (out, r) @ (r, in)
        return weight_OI.T if self.transposed else weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (..., out), for x (..., in), in the dtype of the plain layer's."""
        dtype = product_dtype(x, self.a.dtype)
        h = F.linear(x.to(dtype), self.a.to(dtype))  # (..., in) @ (in, r)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.linear(h, self.b.to(dtype), bias)  # (..., r) @ (r, out)
        return y.to(product_dtype(x, x.dtype))


class LowRankMethod(Method):
    """A method that replaces W by factors of a rank that subclasses say."""

    def ranks(self, model: nn.Module, targets: list[Target]) -> Mapping[str, int]:
        """Return target name -> rank, for the targets that are replaced."""
        raise NotImplementedError

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Replace W by its best approximation of the rank; targets without a rank stay frozen."""
        ranks = self.ranks(model, targets)
        self.targets = targets
        entries = dict.fromkeys((target.name for target in targets), 0)
        for target in targets:
            if target.name in ranks:
                _replace(model, target, *best_factors(wide_OI(model, target), ranks[target.name]))
                entries[target.name] = ranks[target.name] * (
                    target.out_features + target.in_features
                )
        found = sorted(set(ranks.values()))
        span = f"rank {found[0]}" if len(found) == 1 else f"ranks {found[0]} to {found[-1]}"
        note = f"W is a product of {span} in {len(ranks)} of {len(targets)} targets"
        return Adapted(entries, note=note)

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load by name. Ranks are those of the adapter, however they were chosen."""
        for target in self.targets:
            name, layer = f"{target.name}.b", model.get_submodule(target.name)
            if name in tensors:
                b_OR, a_RI = tensors[name], tensors[f"{target.name}.a"]
                if (len(b_OR), a_RI.shape[-1]) != (target.out_features, target.in_features):
                    raise KeyError(name)
                device = next(layer.parameters()).device
                _replace(model, target, *(t.to(device, copy=True) for t in (b_OR, a_RI)))
            elif isinstance(layer, FactoredLinear):
                raise KeyError(name)  # W is gone: what the adapter was trained beside
        load_by_name(model, tensors)

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return B A, or W where it was not replaced."""
        layer = model.get_submodule(target.name)
        if isinstance(layer, FactoredLinear):
            return layer.b.detach().double() @ layer.a.detach().double()
        return super().merged_OI(model, target)


def wide_OI(model: nn.Module, target: Target) -> Tensor:
    """Return W in float32 or wider, (out, in)."""
    weight_OI = target.weight_OI(model).detach()
    return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))


def best_factors(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B = U S^1/2 (out, r) and A = S^1/2 V' (r, in) of the largest singular values."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = s_K[:rank].sqrt()
    b_OR, a_RI = u_OK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]
    # As a loaded adapter holds them: products of other layouts round differently.
    return b_OR.contiguous(), a_RI.contiguous()


def _replace(model: nn.Module, target: Target, b_OR: Tensor, a_RI: Tensor) -> None:
    layer = model.get_submodule(target.name)
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    factored = FactoredLinear(b_OR, a_RI, bias, transposed=target.transposed)
    factored.train(layer.training)
    model.set_submodule(target.name, factored)
