"""One thread: on tiny tensors, threads wait for each other more than they work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.tiny_models import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
