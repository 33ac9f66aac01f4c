"""What the generated cases came to, at the end of a session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hostility import COUNTS
from little import base_folder, data_folder, train
from tiny import one_thread

CORE = ("method.form=core", "method.density=0.05", "method.rank=7")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the core form."""
    place = tmp_path_factory.mktemp("hostile")
    with one_thread():
        return train(place / "run", base_folder(place / "base"), data_folder(place / "data"), *CORE)


@pytest.fixture
def exportable(finished: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of all properties tried, as docs/hostile.md has it."""
    if not COUNTS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("hostile cases")
    write("| property | cases | refused | accepted | tracebacks |")
    write("| --- | --: | --: | --: | --: |")
    for what, count in sorted(COUNTS.items()):
        numbers = (count.cases, count.refused, count.accepted, count.tracebacks)
        write(f"| {what} | {' | '.join(f'{n:,}' for n in numbers)} |")
    total = [sum(getattr(c, k) for c in COUNTS.values()) for k in vars(next(iter(COUNTS.values())))]
    write(f"| all | {' | '.join(f'{n:,}' for n in total)} |")
