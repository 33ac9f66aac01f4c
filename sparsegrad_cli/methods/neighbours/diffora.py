"""DiffoRA: gates on all target modules train first; LoRA then trains in those with the largest.

Jiang et al. 2025, "DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module
Selection", arXiv 2502.08905. The choice of modules, a matrix of zeros and ones, is relaxed to
numbers between 0 and 1: a target computes x W' + gamma s (x A') B' with gamma = sigmoid(gate). Two
problems are solved in turn: A, B and the head minimize the loss on one half of the batches, the
gates on the other half. Then the targets with the largest gates keep their adapters.

Both phases are part of one run. In the first, steps alternate between the two problems, each on its
own batch, with first-order gradients. At its end gamma becomes 1 in the targets that are kept and 0
in the others, for good. In the targets that are kept B is multiplied by gamma, and its moments are
divided by it, so neither what the model computes nor AdamW's next step jumps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, Factors
from sparsegrad_cli.methods.neighbours.adaptive_settings import DifforaSettings
from sparsegrad_cli.methods.neighbours.change import ChangeMethod, LowRankChange, Place
from sparsegrad_cli.methods.neighbours.sora import without_zero_ranks
from sparsegrad_cli.methods.optimizer import make_optimizer
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.schema import TrainSection

_DECIDED = 1000.0  # a gate of this size: its sigmoid is exactly 0 or 1


class DifforaChange(LowRankChange):
    """D = sigmoid(gate) s B A with B (out, r), A (r, in) and a gate (1,) that starts at zero."""

    def __init__(self, place: Place, scale: float) -> None:
        super().__init__()
        like, rank = place.like, place.rank
        self.b = nn.Parameter(like.new_zeros(place.out_features, rank))
        self.a = nn.Parameter(like.new_empty(rank, place.in_features))
        self.gate = nn.Parameter(like.new_zeros(1))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def product(self) -> tuple[Tensor, Tensor]:
        """Return sigmoid(gate) s B and A."""
        return self.b * (self.scale * torch.sigmoid(self.gate)), self.a


class GateSearch:
    """The first phase of a run, as hooks of its optimizer.

    Args:
        optimizer: AdamW on all parameters that train.
        changes: the changes of all targets, in order.
        kept: number of targets that keep their adapters.
        steps: number of steps of the first phase; None if it never ends.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        changes: list[DifforaChange],
        kept: int,
        steps: int | None,
    ) -> None:
        self.optimizer, self.changes, self.kept, self.steps = optimizer, changes, kept, steps
        self.made = 0  # steps of the run, which AdamW's own counters say after a restart
        self.chosen: bool | None = False  # None after a restart: the gates say it
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        optimizer.register_load_state_dict_post_hook(self.restored)

    def before(self, *_: object) -> None:
        """Drop the gradients of the parameters that this step leaves alone."""
        gates = {change.gate for change in self.changes}
        if self.chosen is None:  # also right for a run that was given more steps since
            self.chosen = any(abs(float(gate.detach())) >= _DECIDED for gate in gates)
        searching = not self.chosen
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                weights_turn = not searching or self.made % 2 == 0
                if (parameter in gates) == weights_turn:
                    parameter.grad = None
        if not searching:
            for parameter in self._of_dropped():
                parameter.grad = None

    def _of_dropped(self) -> Iterator[nn.Parameter]:
        for change in self.changes:
            if float(change.gate.detach()) < 0:
                yield from (change.a, change.b)

    def after(self, *_: object) -> None:
        """Count the step, and choose the targets when the first phase ends."""
        self.made += 1
        if not self.chosen and self.steps is not None and self.made >= self.steps:
            self.choose()

    def restored(self, _: torch.optim.Optimizer) -> None:
        """Read the number of steps from AdamW's counters of the gates and of the kept factors."""
        state = self.optimizer.state
        counts = [
            sum(int(state[p].get("step", 0)) for p in (change.a, change.gate))
            for change in self.changes
        ]
        self.made, self.chosen = max(counts, default=0), None

    @torch.no_grad()
    def choose(self) -> None:
        """Keep the targets with the largest gates; of equal gates the first."""
        self.chosen = True
        gates = [float(change.gate) for change in self.changes]
        order = sorted(range(len(gates)), key=lambda n: -gates[n])
        for number in order[: self.kept]:
            change = self.changes[number]
            gamma = torch.sigmoid(change.gate)
            change.b.mul_(gamma)
            state = self.optimizer.state[change.b]
            state["exp_avg"].div_(gamma)
            state["exp_avg_sq"].div_(gamma.square())
            change.gate.fill_(_DECIDED)
        for number in order[self.kept :]:
            self.changes[number].gate.fill_(-_DECIDED)


class Diffora(ChangeMethod):
    """See :class:`sparsegrad_cli.methods.implementation.Method`."""

    settings: DifforaSettings

    def make_change(self, place: Place) -> DifforaChange:
        """Return a change whose B is zero."""
        return DifforaChange(place, (self.settings.alpha or 2 * place.rank) / place.rank)

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Put a gated adapter beside every target."""
        adapted = super().adapt(model, targets, bases, scores)
        kept, steps = self.settings.kept(len(targets)), self._search_steps()
        phase = "" if steps is None else f" for the first {steps} steps"
        adapted.note += f"; all {len(targets)} targets train{phase}, then {kept} of them"
        return adapted

    def _search_steps(self) -> int | None:
        if self.training is None:
            return None
        # At least one step for the factors and one for the gates.
        return max(2, round(self.settings.search * self.training.steps))

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW with the search for gates. Gates do not decay."""
        changes = [module for module in model.modules() if isinstance(module, DifforaChange)]
        gates = {change.gate for change in changes}
        optimizer = make_optimizer(model, train, undecayed=gates)
        GateSearch(optimizer, changes, self.settings.kept(len(changes)), self._search_steps())
        return optimizer

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return B and A; of a target that was not kept, a single rank of zeros."""
        found = super().factors(model, target)
        return found and without_zero_ranks(found)
