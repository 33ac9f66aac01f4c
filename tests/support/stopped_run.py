"""A run that was stopped after three of its six steps, and how one goes on with it."""

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


class Stopped(NamedTuple):
    """The run's folder, its model's and its data's: to be copied, not changed."""

    run: Path
    base: Path
    data: Path


@functools.cache
def stopped() -> Stopped:
    """Trained once in a session."""
    place = Path(tempfile.mkdtemp())
    base, data = base_folder(place / "base"), data_folder(place / "data")
    with one_thread():
        run = train(place / "run", base, data, *CORE, stop=True)
    shutil.rmtree(run / "checkpoint-6")
    return Stopped(run, base, data)


def resumed(run: Path) -> Path:
    """Go on with a copy of it."""
    return train(run, stopped().base, stopped().data, *CORE, resume=True)


def seal_anew(run: Path) -> None:
    """As who means harm would, for a digest is no signature."""
    (run / "checkpoint-3" / MANIFEST).unlink()
    seal(run / "checkpoint-3", record(run)["recipe_digest"])


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """In one thread, and with what a stopped run left made beforehand."""
    with one_thread():
        stopped()
        yield
