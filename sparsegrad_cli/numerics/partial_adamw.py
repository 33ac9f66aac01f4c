"""AdamW that steps some parameters in a way of their own and the others whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw as torch_adamw

from sparsegrad_cli.numerics.selective_adamw import AdamW


class PartialAdamW(torch.optim.Optimizer):
    """AdamW with a step of its own for some parameters; :meth:`step_partly` says which.

    Args:
        params: parameters or parameter groups, as in ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def step_partly(self, parameter: nn.Parameter, adamw: AdamW) -> bool:
        """Step a parameter that has a gradient; return False if it is to be stepped whole."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step on the accumulated gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            adamw = AdamW(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is not None and not self.step_partly(parameter, adamw):
                    step_whole(parameter, self.state[parameter], adamw)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state without torch's cast of every tensor to the parameter's dtype.

        Positions and ages stay integers and moments float32, whatever the parameter's dtype.
        """
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            moved = {key: value.to(parameter.device) for key, value in saved.items()}
            if "step" in saved:
                moved["step"] = saved["step"]  # stays on the CPU, where it is read in every step
            self.state[parameter].update(moved)


def step_whole(parameter: nn.Parameter, state: dict[str, Any], adamw: AdamW) -> None:
    """Make a plain AdamW step on a parameter with the arithmetic of ``torch.optim.AdamW``.

    Args:
        parameter: has a gradient.
        state: of this parameter; filled if it is empty.
        adamw: hyperparameters.
    """
    assert parameter.grad is not None
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    torch_adamw(
        [parameter],
        [parameter.grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        amsgrad=False,
        beta1=adamw.beta1,
        beta2=adamw.beta2,
        lr=adamw.lr,
        weight_decay=adamw.weight_decay,
        eps=adamw.eps,
        maximize=False,
    )
