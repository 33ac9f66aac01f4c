"""A study's budget is solved by one process; those that share the study read what it picked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from sparsegrad_cli.io.paths import is_file
from sparsegrad_cli.records.store import load_record
from sparsegrad_cli.report.access import block
from sparsegrad_cli.study.claims import Claim, claim, holder_of
from sparsegrad_cli.study.folder import LEDGER, SOLVING, StudyFolder
from sparsegrad_cli.study.jobs import POLL_S


def picked(place: StudyFolder) -> Mapping[str, Any]:
    """The ``budget`` block of the comparison there; empty where there is none.

    Raises:
        FileFormatError: compare.json is damaged.
    """
    ledger = place.path / LEDGER
    return block(load_record(ledger), "budget") if is_file(ledger) else {}


@contextmanager
def solving(place: StudyFolder, tell: Callable[[str], None], *, overwrite: bool) -> Iterator[None]:
    """Inside, nobody else solves a budget for this folder; waits for whoever does.

    It is to last until compare.json says what was picked: who comes next reads it there, and no two
    processes share a study at different sizes. Should nothing come of it, a folder that was made
    for it is removed.

    Args:
        tell: called with a line if somebody has to be waited for.
        overwrite: something else may be in the folder.

    Raises:
        SparsegradError: as :meth:`StudyFolder.prepare`.
    """
    was_there = place.path.exists()
    place.prepare(overwrite=overwrite)
    try:
        with _claimed(place, tell):
            yield
    except BaseException:
        for path in () if was_there else (place.path / "cells", place.path):
            with suppress(OSError):  # there is something in it
                path.rmdir()
        raise


def _claimed(place: StudyFolder, tell: Callable[[str], None]) -> Claim:
    path, told = place.path / SOLVING, False
    while (held := claim(path)) is None:
        who = holder_of(path)
        if who and not told:
            tell(f"{who} solves the budget: what it picks counts here, too")
            told = True
        time.sleep(POLL_S)
        path.parent.mkdir(parents=True, exist_ok=True)  # who gives up takes the folder along
    return held
