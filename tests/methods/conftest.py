"""One thread, and which variants of the contract are slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.tiny_models import one_thread

from sparsegrad_cli.methods.neighbours.adaptive_settings import ADAPTIVE
from sparsegrad_cli.methods.neighbours.change_settings import CHANGES
from sparsegrad_cli.methods.neighbours.factor_settings import FACTORS
from sparsegrad_cli.methods.neighbours.gradient_settings import GRADIENTS

_NEIGHBOURS = {*CHANGES, *GRADIENTS, *ADAPTIVE, *FACTORS}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the second architecture of the neighbouring methods to the slow target."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        second = parameters.get("architecture") == "gpt2" and parameters.get("name") in _NEIGHBOURS
        if second and item.path.name == "test_contract.py":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tiny tensors, threads wait for each other more than they work."""
    with one_thread():
        yield
