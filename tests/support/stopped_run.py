"""A run stopped after three of its six steps, and how to resume a copy of it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsegrad_cli.run.checkpoints import MANIFEST, seal
from support.small_runs import base_folder, data_folder, record, train
from support.tiny_models import one_thread

CORE = ("method.form=core", "method.density=0.05", "method.rank=7", "train.save_total_limit=5")


class StoppedRun(NamedTuple):
    """Folders of the run, its model and its data. Tests copy them and never change them."""

    run: Path
    base: Path
    data: Path


@functools.cache
def stopped_run() -> StoppedRun:
    """Train the run, once per session."""
    place = Path(tempfile.mkdtemp())
    base, data = base_folder(place / "base"), data_folder(place / "data")
    with one_thread():
        run = train(place / "run", base, data, *CORE, stop=True)
    shutil.rmtree(run / "checkpoint-6")
    return StoppedRun(run, base, data)


def resume_copy(run: Path) -> Path:
    """Resume a copy of the run."""
    return train(run, stopped_run().base, stopped_run().data, *CORE, resume=True)


def reseal(run: Path) -> None:
    """Recompute the manifest of a changed checkpoint, as an attacker would."""
    (run / "checkpoint-3" / MANIFEST).unlink()
    seal(run / "checkpoint-3", record(run)["recipe_digest"])


@contextlib.contextmanager
def with_stopped_run() -> Iterator[None]:
    """Use one thread, and train the stopped run before the block starts."""
    with one_thread():
        stopped_run()
        yield
