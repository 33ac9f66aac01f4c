"""AdamW whose state covers a view of a gradient: a subspace of it, or a part of its entries.

The targets' weights W train themselves. What a method keeps state for is its *view* of the
gradient; every other parameter that trains (head and rest) is stepped by plain AdamW in the same
optimizer. All state consists of tensors by name, so that a checkpoint in safetensors resumes bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.implementation import Adapted, Method, weight_of
from sparsegrad_cli.methods.optimizer import adamw_settings, parameter_groups
from sparsegrad_cli.models.precision import unfreeze_parameter
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.numerics.partial_adamw import PartialAdamW
from sparsegrad_cli.numerics.selective_adamw import AdamW
from sparsegrad_cli.recipe.schema import TrainSection

State = dict[str, Tensor]


def adam_direction(grad: Tensor, state: State, adamw: AdamW, age: int) -> Tensor:
    """Update the moments in ``state`` and return Adam's direction m^ / (sqrt(v^) + eps).

    Adam (Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1) with the bias corrections of step ``age``.
    W - lr times the result is the step of Adam.

    Args:
        grad: of any shape, float32 or wider.
        state: ``exp_avg`` and ``exp_avg_sq`` in the shape of ``grad``; made here if missing.
        adamw: betas and eps are used.
        age: number of updates of these moments, this one included.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(grad, 1 - adamw.beta1)
    second.mul_(adamw.beta2).addcmul_(grad, grad, value=1 - adamw.beta2)
    denominator = (second / (1 - adamw.beta2**age)).sqrt_().add_(adamw.eps)
    return first / (1 - adamw.beta1**age) / denominator


class View:
    """How the gradient of one matrix becomes a step, with state for a view of it only.

    Args:
        update_every: steps between two choices of the view.
        first: the step from which ``update_every`` counts; step 1 always makes a choice.
    """

    def __init__(self, update_every: int, first: int = 1) -> None:
        self.update_every, self.first = update_every, first

    def chooses(self, step: int) -> bool:
        """Return whether the view is chosen in this step, counted from 1.

        An estimate reads every number as 1, so it counts a step with a choice: the upper limit.
        """
        return step == 1 or (step - self.first) % self.update_every == 0

    def direction(self, grad_OI: Tensor, state: State, adamw: AdamW, step: int) -> Tensor:
        """Return D (out, in) such that W - lr D is the step, and update the state.

        Args:
            grad_OI: gradient of W, (out, in), float32 or wider.
            state: tensors by name, which belong to this view.
            adamw: hyperparameters.
            step: number of this step, from 1.
        """
        raise NotImplementedError


class SubspaceView(View):
    """Adam in a subspace of the gradient's shorter side, P' G with P (short, r).

    Subclasses choose P. The moments stay as they are when P changes.

    Args:
        rank: r; at most the shorter side.
        update_every: steps between two choices of P.
        scale: factor of the step.
        first: as in :class:`View`.
    """

    def __init__(self, rank: int, update_every: int, scale: float, first: int = 1) -> None:
        super().__init__(update_every, first)
        self.rank, self.scale = rank, scale

    def choose(self, grad_SL: Tensor, state: State) -> None:
        """Put what P follows from into the state; ``grad_SL`` is (short, long)."""
        raise NotImplementedError

    def basis(self, grad_SL: Tensor, state: State) -> Tensor:
        """Return P, (short, r), with orthonormal columns."""
        raise NotImplementedError

    def beyond(
        self,
        grad_SL: Tensor,
        p_SR: Tensor,
        low_RL: Tensor,
        adam_RL: Tensor,
        state: State,
        eps: float,
    ) -> Tensor | None:
        """Return the direction outside of the subspace, (short, long); None: there is none.

        Args:
            grad_SL: G, (short, long).
            p_SR: P, (short, r).
            low_RL: P' G, (r, long).
            adam_RL: Adam's direction of P' G, (r, long).
            state: as in :meth:`direction`.
            eps: Adam's.
        """
        return None

    def direction(self, grad_OI: Tensor, state: State, adamw: AdamW, step: int) -> Tensor:
        """Return scale (P Adam(P' G) + what :meth:`beyond` adds), (out, in)."""
        tall = grad_OI.shape[0] > grad_OI.shape[1]
        grad_SL = grad_OI.T if tall else grad_OI
        if self.chooses(step):
            self.choose(grad_SL, state)
        p_SR = self.basis(grad_SL, state)
        low_RL = p_SR.T @ grad_SL  # (r, short) @ (short, long)
        adam_RL = adam_direction(low_RL, state, adamw, step)
        step_SL = p_SR @ adam_RL  # (short, r) @ (r, long)
        more_SL = self.beyond(grad_SL, p_SR, low_RL, adam_RL, state, adamw.eps)
        step_SL = step_SL if more_SL is None else step_SL + more_SL
        step_SL = step_SL * self.scale
        return step_SL.T if tall else step_SL


class ProjectedAdamW(PartialAdamW):
    """AdamW on views of some parameters' gradients, plain AdamW on the other parameters.

    Args:
        params: parameters or parameter groups, as in ``torch.optim.AdamW``.
        views: the view of each parameter that has one: a matrix (out, in).
        transposed: those of them that hold W' (in, out).
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        views: Mapping[nn.Parameter, View],
        transposed: Iterable[nn.Parameter] = (),
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._views, self._transposed = dict(views), set(transposed)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step_partly(self, parameter: nn.Parameter, adamw: AdamW) -> bool:
        """Step a parameter that has a view."""
        view = self._views.get(parameter)
        if view is not None:
            self._step_view(parameter, view, adamw)
        return view is not None

    def _step_view(self, parameter: nn.Parameter, view: View, adamw: AdamW) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        state["step"] += 1
        turned = parameter in self._transposed
        grad_OI = parameter.grad.T if turned else parameter.grad
        step_OI = view.direction(grad_OI, state, adamw, int(state["step"]))
        if adamw.weight_decay:
            parameter.mul_(1 - adamw.lr * adamw.weight_decay)
        parameter.sub_(step_OI.T if turned else step_OI, alpha=adamw.lr)


def projected_adamw(
    model: nn.Module,
    views: Mapping[nn.Parameter, View],
    transposed: Iterable[nn.Parameter],
    train: TrainSection,
) -> ProjectedAdamW:
    """Return AdamW on these views, and on all of the other parameters that train."""
    groups = parameter_groups(model, train)
    return ProjectedAdamW(groups, views, transposed, **adamw_settings(train))


class ProjectedMethod(Method):
    """A method that trains the targets' weights themselves, each through a view of its gradient."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._targets: list[Target] = []

    def view(self, target: Target, number: int) -> View:
        """Return the view of a target.

        Args:
            target: the target module.
            number: its place among the targets, from 0.
        """
        raise NotImplementedError

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Unfreeze the targets' weights; the model itself is unchanged."""
        self._targets = targets
        for target in targets:
            unfreeze_parameter(weight_of(model, target))
        rank = getattr(self.settings, "rank", 0)
        narrow = [t for t in targets if min(t.out_features, t.in_features) < rank]
        note = f"rank {rank} is cut to the narrow side of {len(narrow)} modules" if narrow else ""
        return Adapted({target.name: target.size for target in targets}, note=note)

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return AdamW on the targets' views, plain AdamW on head and rest."""
        views = {weight_of(model, t): self.view(t, n) for n, t in enumerate(self._targets)}
        transposed = [weight_of(model, t) for t in self._targets if t.transposed]
        return projected_adamw(model, views, transposed, train)
