"""Run in one thread, which is faster for tiny tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.tiny_models import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
