"""Follow which module of a model is running, and evaluate a model for a while."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and give every module its own mode back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def trace_modules(
    model: nn.Module,
    *,
    before: Callable[[str, Any], None],
    after: Callable[[str, Any], None],
) -> Iterator[list[str]]:
    """Call functions around the forward of every module of a model.

    Args:
        model: Modules are named as in ``named_modules``, the model itself by its class.
        before: Called with a module's name and its inputs ``(args, kwargs)``.
        after: Called with a module's name and its output.

    Yields:
        The names of the modules that are running, outermost first. A module is in the list between
        its ``before`` and its ``after``.
    """
    running: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            before(name, (args, kwargs))
            running.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            after(name, output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    for name, module in model.named_modules():
        watch(name or type(model).__name__, module)
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def trace_location(model: nn.Module, arrive: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the name of the running module, in forward and backward passes.

    Args:
        model: The model to follow.
        arrive: In a forward pass, it gets the name of the innermost running module, or an empty
            string outside the model. In a backward pass, it gets the name of the module whose
            output's gradient was computed last.
    """
    hooked: dict[int, weakref.ref[Tensor]] = {}  # A parent often returns its child's output.

    def before(name: str, inputs: Any) -> None:
        arrive(name)

    def after(name: str, output: Any) -> None:
        arrive(running[-1] if running else "")
        for tensor in tensors_in(output):
            known = hooked.get(id(tensor))
            if tensor.requires_grad and (known is None or known() is not tensor):
                hooked[id(tensor)] = weakref.ref(tensor)
                tensor.register_hook(_gradient_hook(name, arrive))

    with trace_modules(model, before=before, after=after) as running:
        yield


def _gradient_hook(name: str, arrive: Callable[[str], None]) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        arrive(name)

    return hook


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from tensors_in(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors_in(branch)
