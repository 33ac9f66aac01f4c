"""SaRA: the smallest weights train, with a penalty on the rank of the matrix that they form.

Hu et al. 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
Adaptation", arXiv 2409.06633:

    M = (|W| < theta); only W * M trains                    equations 2 and 3
    loss + lambda |W * M|_*                                  equations 4 and 5, nuclear norm
    after half of the steps, those of M with |W| < theta     section 4.3
    stay in training, and the others keep their values
    gradients are kept at M alone                            equations 6 and 7

The trained parameter is the change v of the chosen weights, so W stays as it is. Density chooses
how many weights train, and theta is the largest of them. The subgradient U V' of the nuclear norm
is added to the gradient of the task, whose loss is the one that is logged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted
from sparsegrad_cli.methods.neighbours.adaptive_settings import SaraSettings
from sparsegrad_cli.methods.neighbours.change import (
    Change,
    ChangedLinear,
    ChangeMethod,
    FrozenLayer,
    Place,
    place_of,
)
from sparsegrad_cli.methods.optimizer import selective_adamw
from sparsegrad_cli.methods.sparse_method import check_positions
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.matrix_change import matrix_change_linear
from sparsegrad_cli.numerics.selective_adamw import BoundedMoments, Moments
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.recipe.schema import TrainSection


class SaraChange(Change):
    """A sparse change: v at the positions of the smallest weights.

    Args:
        place: where the change goes.
        count: number of weights that train.
    """

    kept_buffers = ("positions",)
    positions: Tensor

    def __init__(self, place: Place, count: int) -> None:
        super().__init__()
        self.shape = (place.out_features, place.in_features)
        self.values = nn.Parameter(place.like.new_zeros(count))
        self._read_weight = place.read_weight
        sizes = place.read_weight().abs().reshape(-1)
        smallest = torch.topk(sizes, count, largest=False).indices.sort().values
        self.register_buffer("positions", smallest.to(torch.int32))

    def start(self) -> Tensor:
        """Return the chosen weights before training, (count,)."""
        return self._read_weight().reshape(-1)[self.positions]

    def delta_OI(self) -> Tensor:
        """Return the matrix with v at its positions."""
        return self._scatter(self.values)

    def _scatter(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.positions,), values).view(self.shape)

    def beside(self, x: Tensor, base: FrozenLayer) -> Tensor:
        """Return x (W + D)' + b, saving x and v."""
        bias_O = base.any_bias_O
        return matrix_change_linear(x, self._read_weight, bias_O, self._scatter, self.values)

    def trained_values(self) -> Tensor:
        """Return the chosen weights as they are now, (count,)."""
        return self.start() + self.values

    def penalty_gradient(self) -> Tensor:
        """Return the subgradient of the nuclear norm of the chosen weights, (count,)."""
        subgradient_OI = nuclear_subgradient(self._scatter(self.trained_values()))
        return subgradient_OI.reshape(-1)[self.positions]


def nuclear_subgradient(matrix_OI: Tensor) -> Tensor:
    """Return U V' of the singular value decomposition: a subgradient of the nuclear norm.

    It follows from the eigenvalues e and eigenvectors Q of the smaller Gram matrix: for a tall
    matrix it is M Q e^(-1/2) Q', without the directions whose singular value is zero (Watson 1992).

    Args:
        matrix_OI: (out, in). The products are made in float64.
    """
    if matrix_OI.shape[0] < matrix_OI.shape[1]:
        return nuclear_subgradient(matrix_OI.T).T
    wide_OI = matrix_OI.double()
    eigenvalues_I, vectors_II = torch.linalg.eigh(wide_OI.T @ wide_OI)  # (in, out) @ (out, in)
    smallest = eigenvalues_I[-1] * len(eigenvalues_I) * torch.finfo(torch.float64).eps
    inverse_I = torch.where(eigenvalues_I > smallest, eigenvalues_I, torch.inf).rsqrt()
    # (out, in) @ (in, in) @ (in, in)
    found_OI: Tensor = wide_OI @ (vectors_II * inverse_I) @ vectors_II.T
    return found_OI.to(matrix_OI.dtype)


class SaraAdamW(SelectiveAdamW):
    """AdamW on the chosen weights, with the penalty's gradient and the second choice.

    Args:
        params, selections: as :class:`SelectiveAdamW`.
        changes: the changes whose values are among the parameters.
        penalty: lambda.
        reselect_at: the step after which only values below theta train; None for never.
        more: hyperparameters of :class:`SelectiveAdamW`.
    """

    def __init__(
        self,
        params: Any,
        selections: Mapping[nn.Parameter, Selection],
        *,
        changes: list[SaraChange],
        penalty: float,
        reselect_at: int | None,
        **more: Any,
    ) -> None:
        super().__init__(params, selections, **more)
        self._changes, self._penalty, self._reselect_at = changes, penalty, reselect_at
        self._made = 0  # steps; the state's tensor is what a checkpoint keeps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Add the penalty's gradient, make one step, and choose again if it is time."""
        if self._penalty:
            for change in self._changes:
                if change.values.grad is not None:
                    change.values.grad.add_(change.penalty_gradient(), alpha=self._penalty)
        loss = super().step(closure)
        self._made += 1
        for change in self._changes:
            state = self.state[change.values]
            state["made"] = torch.tensor(self._made, dtype=torch.int32)
            # Once: a run that was given more steps since has another middle.
            if self._made == self._reselect_at and "active" not in state:
                largest = change.start().abs().max()
                state["active"] = change.trained_values().abs() <= largest
        return loss

    def _choose(
        self,
        parameter: nn.Parameter,
        how: Selection,
        grad: Tensor,
        moments: Moments | BoundedMoments,
        beta2: float,
    ) -> Tensor:
        active = self.state[parameter].get("active")
        if active is None:
            return torch.arange(grad.numel(), device=grad.device)
        return torch.nonzero(active).squeeze(1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and the number of steps made."""
        super().load_state_dict(state_dict)
        for change in self._changes:
            if (made := self.state[change.values].get("made")) is not None:
                self._made = int(made)


class Sara(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: SaraSettings  # type: ignore[assignment]

    def __init__(self, settings: SaraSettings) -> None:
        super().__init__(settings)
        self._changes: dict[str, SaraChange] = {}

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put a sparse change of the smallest weights beside every target."""
        entries, frozen = self.settings.requested(targets), []
        for number, target in enumerate(targets):
            layer = model.get_submodule(target.name)
            change = SaraChange(place_of(model, target, number, size=0), entries[target.name])
            model.set_submodule(target.name, ChangedLinear(layer, change))
            frozen.append(change.positions)
            self._changes[target.name] = change
        at = self._reselect_at()
        note = "" if at is None else f"after step {at}, only weights that are still small train"
        return Adapted(entries, sum(entries.values()), note, frozen=frozen)

    def _reselect_at(self) -> int | None:
        if self.training is None or self.settings.reselect == 1:
            return None
        return max(1, round(self.settings.reselect * self.training.steps))

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW with the penalty and the second choice."""
        changes = sara_changes(model)
        make = functools.partial(
            SaraAdamW,
            changes=list(changes.values()),
            penalty=self.settings.rank_weight,
            reselect_at=self._reselect_at(),
        )
        selections = {change.values: Selection(None) for change in changes.values()}
        return selective_adamw(model, selections, train, make)

    def support(self, target: Target) -> tuple[Tensor, tuple[int, int]] | None:
        """Return the positions of the chosen weights and the shape of the matrix."""
        change = self._changes[target.name]
        return change.positions, change.shape

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load by name, positions too: the adapter does not depend on how they were chosen."""
        for name, change in sara_changes(model).items():
            positions, room = tensors[f"{name}.positions"], change.shape[0] * change.shape[1]
            check_positions(name, positions, change.values, room)
        super().load_adapter(model, tensors)


def sara_changes(model: nn.Module) -> dict[str, SaraChange]:
    """Return the changes of a prepared model by their names."""
    return {n: module for n, module in model.named_modules() if isinstance(module, SaraChange)}
