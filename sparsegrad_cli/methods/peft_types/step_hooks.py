"""What a type does in every optimizer step, with state that a checkpoint keeps.

A penalty's gradient is added to those of the task's loss before the step, so that the loss that is
logged stays the task's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.methods.optimizer import make_optimizer as optimizer_of_recipe
from sparsegrad_cli.recipe.schema import TrainSection

_NAME = "default"


def make_optimizer(model: nn.Module, config: Any, train: TrainSection) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for a model with PEFT's layers, with the hooks of their type.

    Args:
        config: PEFT's configuration.
    """
    optimizer = optimizer_of_recipe(model, train)
    penalty = _penalty(model, config)
    if penalty is not None:
        optimizer.register_step_pre_hook(lambda *given: add_gradient(model, penalty))
    if config.peft_type == "ADALORA":
        allocation = RankAllocation(model, config)
        optimizer.register_step_post_hook(lambda *given: allocation.after_step(optimizer))
    return optimizer


def add_gradient(model: nn.Module, penalty: Callable[[], Tensor]) -> None:
    """Add the gradient of a penalty to the gradients of the parameters that it depends on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        gradients = torch.autograd.grad(penalty(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            held = parameter.grad
            parameter.grad = gradient if held is None else held.add_(gradient)


def _penalty(model: nn.Module, config: Any) -> Callable[[], Tensor] | None:
    """Return the penalty of a type; None for those without one."""
    if config.peft_type == "ADALORA" and config.orth_reg_weight:
        return lambda: config.orth_reg_weight * _adalora_penalty(model)
    kasa = getattr(config, "kasa_config", None)
    if kasa is not None and (kasa.beta or kasa.gamma):
        return lambda: kasa_penalty(model, kasa.beta, kasa.gamma)
    if getattr(config, "monteclora_config", None) is not None:
        return lambda: monteclora_penalty(model)
    return None


def _adalora_penalty(model: nn.Module) -> Tensor:
    """Return the mean of ||A A' - I|| and ||B' B - I|| over all A and B (2303.10512, eq. 4)."""
    norms = []
    for name, p in model.named_parameters():
        if f"lora_A.{_NAME}" in name:
            norms.append(_from_identity(p @ p.T))  # (r, in) @ (in, r)
        elif f"lora_B.{_NAME}" in name:
            norms.append(_from_identity(p.T @ p))  # (r, out) @ (out, r)
    return torch.stack(norms).mean()


def _from_identity(square: Tensor) -> Tensor:
    """Return the Frobenius norm of a square matrix less the identity."""
    apart: Tensor = torch.linalg.norm(square - torch.eye(len(square)).to(square))
    return apart


def kasa_penalty(model: nn.Module, beta: float, gamma: float) -> Tensor:
    """Return KaSA's penalties over all layers (arXiv 2412.06071), as PEFT writes them.

    With singular values s: beta ||s||^2 + gamma (||B' B - I|| + ||A A' - I||).
    """
    total = torch.zeros(())
    for layer in _layers(model, "lora_diag"):
        s = layer.lora_diag[_NAME]
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        apart = _from_identity(b.T @ b)  # (r, out) @ (out, r)
        apart = apart + _from_identity(a @ a.T)  # (r, in) @ (in, r)
        total = total.to(s.device) + beta * s.square().sum() + gamma * apart
    return total


def monteclora_penalty(model: nn.Module) -> Tensor:
    """Return the mean over layers of MonteCLoRA's divergences and entropy (2411.04358).

    They are computed again from the last sample: the backward pass has freed the graph of the
    forward pass.
    """
    terms = []
    for layer in _layers(model, "lora_monteclora_sampler"):
        sampler = layer.lora_monteclora_sampler[_NAME]
        sample = {key: z.to(sampler.std_prior) for key, z in sampler.sampler.buffer[0].items()}
        std = torch.diag(sampler.std_prior.exp())
        alpha = sampler.expert_weights_prior.exp()
        variance = sampler.wishart_reparameterization(std, sample["z_wishart"])
        divergence = (
            sampler.dirichlet_kl(alpha)
            + sampler.wishart_kl(std)
            + sampler.multivariate_kl(variance)
        )
        term = sampler.kl_loss_weight * divergence
        if sampler.use_entropy:
            logits = sampler.dirichlet_reparameterization(alpha, sample["z_dirichlet"])
            term = term + logits.softmax(-1).square().sum()
        terms.append(term)
        # PEFT keeps these with the graph of the forward pass, which could then not be copied.
        sampler.gaussian_var_prior = sampler.gaussian_var_prior.detach()
        sampler.expert_weights = sampler.expert_weights.detach()
    return torch.stack(terms).mean()


def draw_in_every_step(model: nn.Module) -> None:
    """Let MonteCLoRA draw its samples in the forward pass that uses them.

    PEFT draws the first ones when it makes the layers, which a resumed run would use once more.
    """
    for layer in _layers(model, "lora_monteclora_sampler"):
        buffered = layer.lora_monteclora_sampler[_NAME].sampler
        buffered.index = buffered.buffer_size


def _layers(model: nn.Module, attribute: str) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, attribute))


class RankAllocation:
    """AdaLoRA's allocation of ranks (2303.10512), by PEFT's allocator.

    The allocator keeps its averages in dictionaries of its own; here they are tensors of the
    optimizer's state, and the step is AdamW's, so that a checkpoint holds them.

    Args:
        model: with AdaLoRA's layers.
        config: PEFT's configuration, with ``total_step``.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        self._config = config
        self._allocator = RankAllocator(model, config, _NAME)
        self._model = model

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the averages after AdamW's step, and mask the triplets beyond the budget."""
        allocator, model = self._allocator, self._model
        if allocator.init_bgt <= allocator.target_bgt:
            return  # nothing to take away
        own = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and ".lora_" in name
        }
        if not own:
            return
        states = {name: optimizer.state[parameter] for name, parameter in own.items()}
        step = int(next(iter(states.values()))["step"])
        last = self._config.total_step - self._config.tfinal
        for name, state in states.items():
            for key in ("sensitivity", "uncertainty"):
                state.setdefault(key, torch.zeros_like(own[name]))
        allocator.ipt = dict.fromkeys(own)
        allocator.exp_avg_ipt = {name: state["sensitivity"] for name, state in states.items()}
        allocator.exp_avg_unc = {name: state["uncertainty"] for name, state in states.items()}
        if step <= last:
            allocator.update_and_allocate(model, step, force_mask=step == last)
        for name, state in states.items():
            state["sensitivity"] = allocator.exp_avg_ipt[name]
            state["uncertainty"] = allocator.exp_avg_unc[name]
        self._hold_mask(own, states, step, last)

    def _hold_mask(
        self, own: dict[str, nn.Parameter], states: dict[str, Any], step: int, last: int
    ) -> None:
        """Keep the triplets masked that the last allocation has masked."""
        for name, parameter in own.items():
            if "lora_E" not in name:
                continue
            kept = states[name].setdefault("kept", torch.ones_like(parameter))
            with torch.no_grad():
                if step == last:
                    kept.copy_((parameter != 0).to(kept))
                elif step > last:
                    parameter.mul_(kept)
