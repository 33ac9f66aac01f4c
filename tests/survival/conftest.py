"""One fork server and one workspace of tiny runs for all survival tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.kill_process import ForkServer
from support.survival_runs import Workspace
from support.tiny_models import one_thread


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as process:
        yield process


@pytest.fixture(scope="session")
def workspace(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    with one_thread():
        return Workspace(tmp_path_factory.mktemp("workspace"), fork_server)
