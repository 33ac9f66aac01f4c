"""AdamW on chosen entries of some parameters, as a torch optimizer.

Entries are chosen only here, in the optimizer step: so once per step, on the accumulated gradient,
whatever the number of micro-batches or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.partial_adamw import PartialAdamW
from sparsegrad_cli.numerics.rotation import from_sparse_core, to_core
from sparsegrad_cli.numerics.selective_adamw import (
    AdamW,
    BoundedMoments,
    Moments,
    sparse_step,
    step_on_entries,
)
from sparsegrad_cli.numerics.supports import largest_entries


@dataclass(frozen=True)
class Selection:
    """How the entries of one parameter are chosen.

    Attributes:
        count: entries per step, the largest by magnitude; None takes the non-zero ones.
        basis: choose and step in this basis, while the parameter itself stays in the original one.
        transposed: the parameter holds W' (in, out).
        capacity: maximum number of entries with optimizer state; None keeps state for all.
        refresh: hold a choice for this many steps, then choose by their mean |gradient|.
        first: with ``refresh``, the first choice; None takes the largest of the first gradient.
    """

    count: int | None
    basis: Basis | None = None
    transposed: bool = False
    capacity: int | None = None
    refresh: int | None = None
    first: Tensor | None = None

    def choose(self, grad: Tensor) -> Tensor:
        """Return flat positions in ``grad``."""
        if self.count is None:
            return torch.nonzero(grad.reshape(-1)).squeeze(1)
        return largest_entries(grad, self.count)


# Names of bounded state in checkpoints, in the order of BoundedMoments' attributes.
_BOUNDED = ("positions", "exp_avg", "exp_avg_sq", "age", "last", "clock")


class SelectiveAdamW(PartialAdamW):
    """AdamW on chosen entries of some parameters, plain AdamW on the others.

    Args:
        params: parameters or parameter groups, as in ``torch.optim.AdamW``.
        selections: how entries are chosen, for each parameter of which only some are stepped; the
            others are stepped whole.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        selections: Mapping[nn.Parameter, Selection],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._selections = dict(selections)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on the accumulated gradients.

        Raises:
            RuntimeError: The parameters were replaced after the optimizer was made.
        """
        self._check_parameters()
        return super().step(closure)

    def step_partly(self, parameter: nn.Parameter, adamw: AdamW) -> bool:
        """Step the chosen entries of a parameter that has a selection."""
        selection = self._selections.get(parameter)
        if selection is not None:
            self._step_chosen(parameter, selection, adamw)
        return selection is not None

    def _check_parameters(self) -> None:
        """Check that the chosen parameters are those of the groups.

        accelerate puts other parameters into the groups when it splits a model, and these would be
        stepped whole.

        Raises:
            RuntimeError: A chosen parameter is in no group.
        """
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        if not all(id(parameter) in held for parameter in self._selections):
            raise RuntimeError(
                "the parameters of the optimizer were replaced after it was made, as FSDP and "
                "DeepSpeed do: entries can be chosen only in parameters that are not split"
            )

    def _step_chosen(self, parameter: nn.Parameter, how: Selection, adamw: AdamW) -> None:
        assert parameter.grad is not None
        if how.basis is None:
            moments = self._moments(parameter, how, parameter)
            indices = sparse_step(
                parameter.data,
                parameter.grad,
                moments,
                adamw,
                lambda grad: self._choose(parameter, how, grad, moments, adamw.beta2),
            )
            self._keep(parameter, moments, indices, parameter.numel())
            return
        weight, grad = parameter.data, parameter.grad
        if how.transposed:
            weight, grad = weight.T, grad.T
        core_grad = to_core(grad, how.basis)
        moments = self._moments(parameter, how, core_grad)
        indices = self._choose(parameter, how, core_grad, moments, adamw.beta2)
        values = core_grad.new_zeros(len(indices))
        if adamw.weight_decay:  # decay acts on the core's values, which are not kept: recompute
            values = to_core(weight, how.basis).reshape(-1)[indices]
        update = step_on_entries(indices, core_grad.reshape(-1)[indices], values, moments, adamw)
        weight += from_sparse_core(indices, update, how.basis)
        self._keep(parameter, moments, indices, core_grad.numel())

    def _choose(
        self,
        parameter: nn.Parameter,
        how: Selection,
        grad: Tensor,
        moments: Moments | BoundedMoments,
        beta2: float,
    ) -> Tensor:
        """Return the flat positions to step now: the largest, or those that are held.

        Held positions are chosen again after ``refresh`` steps. New ones then take the mean
        |gradient| of these steps as their second moment (:meth:`Moments.join`).
        """
        if how.refresh is None:
            return how.choose(grad)
        state = self.state[parameter]
        if "held" not in state:
            assert how.count is not None
            first = largest_entries(grad, how.count) if how.first is None else how.first
            state["held"] = first.to(grad.device, torch.int64)
            self._selections[parameter] = replace(how, first=None)
            state["score"] = torch.zeros_like(grad)
            state["since"] = torch.zeros((), dtype=torch.int32, device=grad.device)
        if int(state["since"]) == how.refresh:
            state["held"] = largest_entries(state["score"], len(state["held"]))
            mean_k = state["score"].reshape(-1)[state["held"]] / how.refresh
            moments.join(state["held"], mean_k.square(), beta2)
            state["score"].zero_()
            state["since"].zero_()
        state["score"] += grad.abs()
        state["since"] += 1
        held: Tensor = state["held"]
        return held

    def _moments(
        self, parameter: nn.Parameter, how: Selection, like: Tensor
    ) -> Moments | BoundedMoments:
        """Return the state of a parameter that is stepped in the shape of ``like``."""
        state = self.state[parameter]
        if how.capacity is not None:
            if "positions" not in state:
                return BoundedMoments.empty(how.capacity, like)
            return BoundedMoments(how.capacity, *(state[name] for name in _BOUNDED))
        if "exp_avg" not in state:
            fresh = Moments.like(like)
            state.update(exp_avg=fresh.first, exp_avg_sq=fresh.second, age=fresh.age)
        return Moments(state["exp_avg"], state["exp_avg_sq"], state["age"])

    def _keep(
        self,
        parameter: nn.Parameter,
        moments: Moments | BoundedMoments,
        indices: Tensor,
        entries: int,
    ) -> None:
        """Store bounded state, whose tensors are new after a step, and mark what moved."""
        if isinstance(moments, Moments):
            return
        state = self.state[parameter]
        if "touched" not in state:
            state["touched"] = torch.zeros(entries, dtype=torch.bool, device=parameter.device)
        state["touched"][indices] = True
        kept = (
            moments.positions,
            moments.first,
            moments.second,
            moments.age,
            moments.last,
            moments.clock,
        )
        state.update(zip(_BOUNDED, kept, strict=True))

    def selects(self, parameter: nn.Parameter) -> bool:
        """Return whether only some entries of a parameter are stepped."""
        return parameter in self._selections

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return (rows, columns) of the matrix that the positions of :meth:`touched` index."""
        rows, columns = parameter.shape
        turned = self._selections[parameter].basis is not None
        turned = turned and self._selections[parameter].transposed
        return (columns, rows) if turned else (rows, columns)

    def touched(self, parameter: nn.Parameter) -> Tensor:
        """Return the flat positions stepped at least once, ascending."""
        state = self.state.get(parameter, {})
        moved = state.get("touched", state.get("age"))
        if moved is None:
            return torch.empty(0, dtype=torch.int64)
        return torch.nonzero(moved.reshape(-1)).squeeze(1)
