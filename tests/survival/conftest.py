"""One forking process and one bench of tiny runs for all tests of survival."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.kill_process import Killer
from support.survival_runs import Bench
from support.tiny_models import one_thread


@pytest.fixture(scope="session")
def killer() -> Iterator[Killer]:
    with Killer() as process:
        yield process


@pytest.fixture(scope="session")
def bench(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with one_thread():
        return Bench(tmp_path_factory.mktemp("bench"), killer)
