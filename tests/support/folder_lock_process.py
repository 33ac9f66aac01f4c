"""A separate process that holds the lock of a run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.paths import REPO

HOLD = """
import os, sys, time
from pathlib import Path
from sparsegrad_cli.io.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if len(sys.argv) > 2 and os.fork() == 0:
    os.write(1, b"child %d\\n" % os.getpid())
    time.sleep(3600)
os.write(1, b"held %d\\n" % os.getpid())
time.sleep(3600)
"""


@contextmanager
def lock_holder(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the process inside the context; any argument gives it a child that outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_process_id(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Read ``held`` or ``child`` and the process id from its output."""
    assert process.stdout is not None
    word, number = process.stdout.readline().split()
    return word, int(number)
