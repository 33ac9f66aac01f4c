"""Runs are started once, stopped together, and always end with a status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.folder_lock_process import lock_holder, read_process_id
from support.paths import REPO

from sparsegrad_cli.errors import DiskError
from sparsegrad_cli.io.atomic import write_json_atomic
from sparsegrad_cli.recipe.load_recipe import digest, load_recipe
from sparsegrad_cli.recipe.schema import Recipe
from sparsegrad_cli.study.engines import Job
from sparsegrad_cli.study.runs import Runs, find_run

# Holds a run's folder as `sparsegrad train --managed` does, and says how it would train.
MANAGED = """
import sys
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.study.runs import managed
loaded = load_recipe(sys.argv[1])
with managed(loaded, lambda note: print(note, flush=True)) as resume:
    print("resume" if resume else "begin", flush=True)
    import time
    time.sleep(600)
"""


class ProgramJob:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.kill = process.kill

    def wait(self, timeout_s: float | None) -> int | None:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)


class ProgramEngine:
    """Run a Python program instead of every run."""

    quiet = True

    def __init__(self, program: str, jobs: int = 1) -> None:
        self.program, self.jobs, self.started = program, jobs, 0

    def submit(self, recipe: Path) -> Job:
        self.started += 1
        return ProgramJob(subprocess.Popen([sys.executable, "-c", self.program]))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(None).recipe


@pytest.mark.parametrize("status", ["done", "out_of_memory"])
@pytest.mark.parametrize("program", ["exit(1)", "import os; os.kill(os.getpid(), 9)"])
def test_a_status_written_by_the_run_is_kept(
    tmp_path: Path, recipe: Recipe, status: str, program: str
) -> None:
    """The process may fail after it has written its status."""
    folder = tmp_path / "r"
    folder.mkdir()
    write_json_atomic(folder / "run.json", {"schema": 1, "status": status, "metrics": {}})
    before = (folder / "run.json").read_bytes()
    assert Runs(ProgramEngine(program)).train(recipe, folder)
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("program", "status", "what"),
    [
        ("import os; os.kill(os.getpid(), 9)", "out_of_memory", "killed by the system"),
        ("exit(3)", "out_of_memory", "exit code 3"),
        ("exit(1)", "failed", "exit code 1"),
    ],
)
def test_a_run_that_died_without_a_status_gets_one(
    tmp_path: Path, recipe: Recipe, program: str, status: str, what: str
) -> None:
    Runs(ProgramEngine(program)).train(recipe, tmp_path / "r")
    run = find_run(tmp_path / "r")
    assert run is not None and run.status == status and run.error is not None
    assert what in run.error.what


def test_a_run_stops_when_stop_when_returns_true(tmp_path: Path, recipe: Recipe) -> None:
    looks = iter([False, False, True])
    runs = Runs(ProgramEngine("import time; time.sleep(600)"))
    assert runs.train(recipe, tmp_path / "r", stop_when=lambda: next(looks))
    assert not runs.is_active(tmp_path / "r")


def test_an_error_in_one_run_stops_all_runs(tmp_path: Path, recipe: Recipe) -> None:
    engine = ProgramEngine("import time; time.sleep(600)", jobs=2)
    runs = Runs(engine)

    def broken() -> None:
        while not engine.started:
            time.sleep(0.01)
        raise DiskError("no room")

    def long(name: str) -> None:
        runs.train(recipe, tmp_path / name)

    with pytest.raises(DiskError, match="no room"):
        runs.run_all([partial(long, "r"), broken, partial(long, "s")])
    assert runs.stopping.is_set() and engine.started == 1
    assert not runs.train(recipe, tmp_path / "later")


def test_a_run_waits_for_another_process_in_its_folder(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "r"
    told: list[Any] = []
    folder.mkdir()
    engine = ProgramEngine("exit(0)")
    with lock_holder(folder) as process:
        read_process_id(process)
        threading.Timer(1.0, process.kill).start()
        runs = Runs(engine, told.append)
        assert runs.is_active(folder)
        assert runs.train(recipe, folder)
    assert len(told) == 1 and f"process {process.pid} on" in told[0] and engine.started == 1


def start_managed(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MANAGED, str(file)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_the_second_of_two_processes_for_a_run_waits_and_then_checks(
    tmp_path: Path, recipe: Recipe
) -> None:
    """Each process ends when its parent dies, which closes its standard input."""
    file, folder = tmp_path / "r.yaml", tmp_path / "r"
    file.write_text(f"output_dir: {folder}\n")
    first = start_managed(file)
    assert first.stdout is not None and first.stdin is not None
    assert first.stdout.readline() == "begin\n"
    second = start_managed(file)
    assert second.stdout is not None and second.stdin is not None
    assert f"process {first.pid} on" in second.stdout.readline()
    run = {"schema": 1, "status": "done", "recipe_digest": digest(load_recipe(file).recipe)}
    write_json_atomic(folder / "run.json", run)
    first.stdin.close()
    assert first.wait(30) == -signal.SIGINT
    assert second.stdout.readline() == "resume\n"  # which leaves a finished run unchanged
    second.stdin.close()
    assert second.wait(30) == -signal.SIGINT
