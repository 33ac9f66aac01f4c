"""Methods that step a few parameters of a dense matrix: the adapter is the stepped positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import (
    Method,
    load_by_name,
    trainable_state,
    weight_of,
)
from sparsegrad_cli.methods.optimizer import selective_adamw
from sparsegrad_cli.methods.sparse_settings import SparseSettings
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.selective_optimizer import Selection, SelectiveAdamW
from sparsegrad_cli.recipe.schema import TrainSection

_POSITIONS, _VALUES = "positions/", "values/"


class SparseMethod(Method):
    """A method whose targets' weights train at chosen positions, which may differ in every step.

    Subclasses set ``targets`` and ``requested`` in :meth:`prepare` and say how positions are
    chosen.
    """

    settings: SparseSettings

    def __init__(self, settings: SparseSettings) -> None:
        super().__init__(settings)
        self.targets: list[Target] = []
        self.requested: Mapping[str, int] = {}
        self._optimizer: SelectiveAdamW | None = None

    def selection(self, target: Target) -> Selection:
        """Return how the parameters of a target are chosen."""
        raise NotImplementedError

    def matrix(self, model: nn.Module, target: Target) -> Tensor:
        """Return the matrix that positions index; by default the weight as its module holds it."""
        return weight_of(model, target).detach()

    def write(self, model: nn.Module, target: Target, positions: Tensor, values: Tensor) -> None:
        """Set the values of :meth:`matrix` at these positions."""
        weight_of(model, target).view(-1)[positions] = values

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW on the chosen parameters."""
        selections = {weight_of(model, t): self.selection(t) for t in self.targets}
        self._optimizer = selective_adamw(model, selections, train)
        return self._optimizer

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return positions (int32) and values that were stepped, and what the scope opens."""
        adapted = {f"{target.name}.weight" for target in self.targets}
        tensors = {name: t for name, t in trainable_state(model).items() if name not in adapted}
        for target in self.targets:
            positions = torch.empty(0, dtype=torch.int64)
            if self._optimizer is not None:
                positions = self._optimizer.touched(weight_of(model, target))
            tensors[_POSITIONS + target.name] = positions.to(torch.int32).cpu()
            values = self.matrix(model, target).reshape(-1)[positions]
            tensors[_VALUES + target.name] = values.detach().cpu()
        return tensors

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load the other parameters by name, and write the values at their positions."""
        found = {
            t.name: (tensors[_POSITIONS + t.name], tensors[_VALUES + t.name]) for t in self.targets
        }
        for target in self.targets:
            check_positions(target.name, *found[target.name], target.size)
        plain = {n: t for n, t in tensors.items() if not n.startswith((_POSITIONS, _VALUES))}
        load_by_name(model, plain)
        with torch.no_grad():
            for target in self.targets:
                positions, values = found[target.name]
                weight = weight_of(model, target)
                self.write(model, target, positions.to(weight.device).long(), values.to(weight))


def check_positions(name: str, positions: Tensor, values: Tensor, room: int) -> None:
    """Check that positions belong to ``values`` in a matrix of ``room`` parameters.

    An index that is negative or too large would write elsewhere or fail halfway.

    Raises:
        ValueError: says what is wrong.
    """
    if positions.dtype not in (torch.int32, torch.int64) or positions.ndim != 1:
        raise ValueError(f"positions of {name} are not a list of whole numbers")
    if positions.shape != values.shape:
        raise ValueError(f"{name} has {len(positions)} positions for {values.numel()} values")
    if not len(positions):
        return
    if int(positions.min()) < 0 or int(positions.max()) >= room:
        raise ValueError(f"positions of {name} lie outside its {room} entries")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"positions of {name} do not ascend: one may be there twice")
