"""W plus a parametrised change: the layer and the method that several neighbours share.

A method of this family keeps W frozen and trains a few parameters from which a change D of W
follows: y = x (W + D)' + b. Its file says how D follows from the parameters (:class:`Change`) and
how they start (:meth:`ChangeMethod.make_change`). All else is here.

The paths save as little for the backward pass as those of the other methods: a product of two
factors saves x once and x A' (:func:`sparsegrad_cli.numerics.frozen_linear.adapter_linear`), and a
core or a diagonal between frozen factors saves x Q_in alone
(:mod:`sparsegrad_cli.numerics.core_linear`, :mod:`sparsegrad_cli.numerics.diagonal_linear`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sparsegrad_cli.methods.implementation import Adapted, Factors, Method
from sparsegrad_cli.methods.neighbours.change_settings import ChangeSettings
from sparsegrad_cli.models.quantized import dequantized, dtype_of, is_quantized
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.core_linear import core_linear
from sparsegrad_cli.numerics.diagonal_linear import diagonal_linear
from sparsegrad_cli.numerics.frozen_linear import adapter_linear, core_beside
from sparsegrad_cli.numerics.hosvd import Basis


@dataclass(frozen=True)
class FrozenLayer:
    """A frozen linear layer: nn.Linear, transformers' Conv1D, or a quantized layer.

    Attributes:
        module: the layer; called with x it returns x W' + b.
        weight: (out, in), a view of its parameter; None for a quantized layer.
        bias: (out,) or None; for a quantized layer, which adds its own, None.
        unpacked: returns W (out, in) of a quantized layer; None for the others.
    """

    module: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    unpacked: Callable[[], Tensor] | None

    @property
    def any_bias_O(self) -> Tensor | None:
        """The bias, also of a quantized layer."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


class Change(nn.Module):
    """The change D of one target's weight. Its parameters are float32 or wider.

    Attributes:
        kept_buffers: names of the buffers that an adapter and a checkpoint hold, because they do
            not follow from the base model and the recipe.
    """

    kept_buffers: tuple[str, ...] = ()

    def delta_OI(self) -> Tensor:
        """Return D, (out, in), in the dtype of the parameters, with gradients to them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x D', (..., out), for x (..., in) by plain products."""
        delta_OI = self.delta_OI()
        return F.linear(x.to(delta_OI.dtype), delta_OI)  # (..., in) @ (in, out)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x W' + b + x D', (..., out), in the dtype of x W' + b.

        Override it where this can save less for the backward pass.
        """
        return beside_plainly(x, base.module, self)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """Return B (out, r) and A (r, in) with B A = D, with gradients; None if D has no such form.

        r should be the lowest that is always enough.
        """
        return None


def beside_plainly(x: Tensor, base: nn.Module, change: Change) -> Tensor:
    """Return base(x) + change(x), (..., out), in the dtype of base(x)."""
    y: Tensor = base(x)
    side: Tensor = change(x)
    return y + side.to(y.dtype)


class LowRankChange(Change):
    """A change that is a product of two factors of low rank: D = B A."""

    def product(self) -> tuple[Tensor, Tensor]:
        """Return B (out, r) and A (r, in), with gradients to the parameters."""
        raise NotImplementedError

    def delta_OI(self) -> Tensor:
        """Return B A."""
        b_OR, a_RI = self.product()
        return b_OR @ a_RI  # (out, r) @ (r, in)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x A') B'."""
        b_OR, a_RI = self.product()
        h = F.linear(x.to(a_RI.dtype), a_RI)  # (..., in) @ (in, r)
        return F.linear(h, b_OR)  # (..., r) @ (r, out)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x W' + b + (x A') B', saving x once and x A'."""
        # The small products that make the factors keep the precision of the parameters.
        with torch.autocast(x.device.type, enabled=False):
            b_OR, a_RI = self.product()
        return adapter_linear(
            x,
            base.weight,
            base.bias,
            a_RI,
            b_OR,
            scaling=1.0,
            product=base.module if base.unpacked else None,
            unpacked=base.unpacked,
        )


class CoreChange(Change):
    """A trained core between frozen factors: D = Q_out S Q_in'.

    Args:
        q_out_OR, q_in_IS: (out, r_out) and (in, r_in), in the dtype of the layer's products;
            buffers outside the state dict.
    """

    q_out: Tensor
    q_in: Tensor

    def __init__(self, q_out_OR: Tensor, q_in_IS: Tensor) -> None:
        super().__init__()
        self.register_buffer("q_out", q_out_OR, persistent=False)
        self.register_buffer("q_in", q_in_IS, persistent=False)

    def core_RS(self) -> Tensor:
        """Return S, (r_out, r_in), with gradients to the parameters."""
        raise NotImplementedError

    def delta_OI(self) -> Tensor:
        """Return Q_out S Q_in'."""
        b_OS, a_SI = self.product()
        return b_OS @ a_SI  # (out, r_in) @ (r_in, in)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return Q_out S and Q_in'."""
        core_RS = self.core_RS()
        # (out, r_out) @ (r_out, r_in)
        return self.q_out.to(core_RS.dtype) @ core_RS, self.q_in.to(core_RS.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """Return ((x Q_in) S') Q_out'."""
        b_OS, a_SI = self.product()
        return F.linear(F.linear(x.to(a_SI.dtype), a_SI), b_OS)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x W' + b + ((x Q_in) S') Q_out', saving x Q_in alone."""
        core_RS = self.core_RS()
        if base.weight is None:
            return core_beside(x, base.module, core_RS, self.q_out, self.q_in)
        return core_linear(x, base.weight, base.bias, core_RS, self.q_out, self.q_in)


class DiagonalChange(Change):
    """A trained diagonal between frozen factors: D = Q_out diag(d) Q_in'. d starts at zero.

    Args:
        q_out_OR, q_in_IR: (out, r) and (in, r), in the dtype of the layer's products; buffers
            outside the state dict.
        like: an empty tensor with the dtype and device of d.
    """

    q_out: Tensor
    q_in: Tensor

    def __init__(self, q_out_OR: Tensor, q_in_IR: Tensor, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("q_out", q_out_OR, persistent=False)
        self.register_buffer("q_in", q_in_IR, persistent=False)
        self.d = nn.Parameter(like.new_zeros(q_out_OR.shape[1]))

    def product(self) -> tuple[Tensor, Tensor]:
        """Return Q_out diag(d) and Q_in'."""
        return self.q_out.to(self.d.dtype) * self.d, self.q_in.to(self.d.dtype).T

    def delta_OI(self) -> Tensor:
        """Return Q_out diag(d) Q_in'."""
        b_OR, a_RI = self.product()
        return b_OR @ a_RI  # (out, r) @ (r, in)

    def forward(self, x: Tensor) -> Tensor:
        """Return ((x Q_in) diag(d)) Q_out'."""
        b_OR, a_RI = self.product()
        return F.linear(F.linear(x.to(a_RI.dtype), a_RI), b_OR)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x W' + b + ((x Q_in) diag(d)) Q_out', saving x Q_in alone."""
        return diagonal_linear(
            x,
            base.weight,
            base.bias,
            self.d,
            self.q_out,
            self.q_in,
            product=base.module if base.unpacked else None,
            unpacked=base.unpacked,
        )


class ChangedLinear(nn.Module):
    """A frozen linear layer with a change of its weight beside it.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or a linear layer of bitsandbytes.
        change: the change of its weight.
    """

    def __init__(self, base_layer: nn.Module, change: Change) -> None:
        super().__init__()
        self.base_layer, self.change = base_layer, change
        self.train(base_layer.training)

    # Under the plain layer's attribute names, which are not parameters of this module.
    @property
    def weight(self) -> Tensor:
        """The weight as the base layer holds it."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the base layer."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x (W + D)' + b, (..., out), for x (..., in)."""
        base = self.base_layer
        if torch.compiler.is_compiling():  # A compiler chooses itself what to save.
            return beside_plainly(x, base, self.change)
        if is_quantized(base):
            unpacked = functools.partial(dequantized, base)
            return self.change.beside(x, FrozenLayer(base, None, None, unpacked))
        weight_OI = self.weight.T if isinstance(base, Conv1D) else self.weight
        return self.change.beside(x, FrozenLayer(base, weight_OI, self.bias, None))


@dataclass(frozen=True)
class Place:
    """Where a change goes.

    Attributes:
        target: the target module.
        number: its number among the targets, from 0.
        size: the value of the settings' ``size_key``, by default the rank.
        read_weight: returns W, (out, in): a view, or a new tensor for a quantized layer.
        like: an empty tensor with the parameters' dtype and device, for ``like.new_zeros(...)``.
        product_dtype: the dtype of the layer's products.
    """

    target: Target
    number: int
    size: int
    read_weight: Callable[[], Tensor]
    like: Tensor
    product_dtype: torch.dtype

    @property
    def rank(self) -> int:
        """The size, where that is the rank of the change."""
        return self.size

    @property
    def narrow_rank(self) -> int:
        """The rank, at most the narrow side of W."""
        return min(self.size, self.out_features, self.in_features)

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.target.out_features

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.target.in_features


class ChangeMethod(Method):
    """A method that trains a change of every target's weight. Subclasses say which change."""

    settings: ChangeSettings

    def make_change(self, place: Place) -> Change:
        """Return the change of one target before training.

        Random numbers may be drawn from torch's global generator. Unless the settings say
        otherwise (``starts_changed``), D is zero.
        """
        raise NotImplementedError

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put a change beside every target."""
        size = self.settings.size_on(targets)
        entries, frozen = {}, []
        for number, target in enumerate(targets):
            layer = model.get_submodule(target.name)
            change = self.make_change(place_of(model, target, number, size))
            model.set_submodule(target.name, ChangedLinear(layer, change))
            entries[target.name] = sum(p.numel() for p in change.parameters() if p.requires_grad)
            frozen += [*change.buffers(), *(p for p in change.parameters() if not p.requires_grad)]
        requested, note = self.settings.requested(targets), self.settings.note(targets)
        return Adapted(entries, requested, note, frozen=frozen)

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return W + D, computed in float64 from the parameters."""
        return target.weight_OI(model).detach().double() + _wide(model, target).delta_OI()

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B and A, computed in float64, where the change is their product."""
        found = _wide(model, target).product()
        if found is None:
            return None
        b_OR, a_RI = found
        return Factors(b_OR, a_RI, a_RI.shape[0])


def change_of(model: nn.Module, target: Target) -> Change:
    """Return the change of a target of a prepared model."""
    layer = model.get_submodule(target.name)
    assert isinstance(layer, ChangedLinear)
    return layer.change


def place_of(model: nn.Module, target: Target, number: int, size: int) -> Place:
    """Return the place of a target's change; arguments are attributes of :class:`Place`."""
    layer = model.get_submodule(target.name)
    dtype = dtype_of(layer)
    # Parameters are float32 or wider whatever W is: small increments must not be lost.
    wide = torch.promote_types(dtype, torch.float32)
    like = torch.empty(0, dtype=wide, device=next(layer.parameters()).device)

    def read_weight() -> Tensor:
        return target.weight_OI(model).detach()

    return Place(target, number, size, read_weight, like, dtype)


def _wide(model: nn.Module, target: Target) -> Change:
    """Return a frozen copy of a target's change in float64."""
    return copy.deepcopy(change_of(model, target)).requires_grad_(False).double()
