"""Finished runs that tests damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.small_runs import base_folder, data_folder, train
from support.tiny_models import one_thread

CORE = ("method.form=core", "method.density=0.05", "method.rank=7")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of the core form."""
    place = tmp_path_factory.mktemp("hostile")
    with one_thread():
        return train(place / "run", base_folder(place / "base"), data_folder(place / "data"), *CORE)


@pytest.fixture
def exportable(finished: Path, tmp_path: Path) -> Path:
    """Copy the finished run to a folder of its own, for the test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
