"""Who runs what: locks that go with their processes, and jobs that several processes share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paths import REPO

from sparsegrad_cli.errors import DiskError, UsageError
from sparsegrad_cli.recipe.study import LoadedStudy, make_study
from sparsegrad_cli.records.store import write_json_atomic
from sparsegrad_cli.study.claims import FileLock, claim, holder_of
from sparsegrad_cli.study.folder import StudyFolder, study_digest
from sparsegrad_cli.study.jobs import Job, work_off
from sparsegrad_cli.study.worker_pool import Crew

# Claims a file and sleeps; with a second argument, hands the lock on to a child that sleeps, too.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from sparsegrad_cli.study.claims import claim
held = claim(Path(sys.argv[1]))
child = 0
if len(sys.argv) > 2:
    child = subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()]).pid
print(child, flush=True)
time.sleep(600)
"""
# Works off jobs that note down who did them; a look at "go" has all processes begin at once.
SHARE = """
import sys, time
from pathlib import Path
from sparsegrad_cli.study.worker_pool import Crew
from sparsegrad_cli.study.jobs import Job, work_off
folder, me = Path(sys.argv[1]), sys.argv[2]
def do(name):
    def run(held):
        with (folder / "journal").open("a") as file:
            file.write(f"{name} {me}\\n")
        time.sleep(0.01)
        (folder / name).touch()
    return Job(name, folder / f"{name}.claim", (folder / name).exists, run)
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
work_off([do(f"j{n}") for n in range(20)], 2, lambda line: None, Crew(quiet=True, jobs=2))
assert all((folder / f"j{n}").exists() for n in range(20))  # whoever did them
"""
# Begins a comparison in a folder, and stays in it.
ENTER = """
import sys, time
from pathlib import Path
from sparsegrad_cli.study.folder import StudyFolder, study_digest
from sparsegrad_cli.recipe.study import make_study
from sparsegrad_cli.records.store import write_json_atomic
study = make_study(None, ("lora", "full"), 1, ())
place = StudyFolder(Path(sys.argv[1]))
place.prepare(overwrite=False)
with place.ledger():
    place.enter(lambda: study, study_digest(study), overwrite=False)
    record = {"schema": 1, "digest": study_digest(study), "cells": []}
    write_json_atomic(place.path / "compare.json", record)
print("in", flush=True)
time.sleep(600)
"""


@contextmanager
def program(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that runs, and the first line it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def enter(path: Path, study: LoadedStudy, *, overwrite: bool = False) -> StudyFolder:
    """Begin to work in a folder, as a comparison does."""
    place = StudyFolder(path)
    place.prepare(overwrite=overwrite)
    with place.ledger():
        there = place.enter(lambda: study, study_digest(study), overwrite=overwrite)
        if there is None:
            record = {"schema": 1, "digest": study_digest(study), "cells": []}
            write_json_atomic(path / "compare.json", record)
    return place


def test_a_claim_belongs_to_one_process_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "cell.claim"
    assert holder_of(path) is None
    with program(HOLD, str(path)) as (process, _):
        assert claim(path) is None and path.exists()
        assert (holder_of(path) or "").startswith(f"process {process.pid} on ")
        process.kill()
        process.wait()
        assert holder_of(path) is None
        held = claim(path)
        assert held is not None and claim(path) is None  # nor twice by one process
        held.close()
    assert list(tmp_path.iterdir()) == []


def test_the_process_of_a_cell_holds_the_claim_beyond_its_parents_death(tmp_path: Path) -> None:
    path = tmp_path / "cell.claim"
    with program(HOLD, str(path), "child") as (process, child):
        try:
            process.kill()
            process.wait()
            assert claim(path) is None and holder_of(path) is not None
        finally:
            os.kill(int(child), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (held := claim(path)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held is not None
        held.close()


def test_a_claim_given_back_is_given_back_by_all_it_was_handed_on_to(tmp_path: Path) -> None:
    """Data loaders may outlive their run for a moment, with its files."""
    held = claim(tmp_path / "cell.claim")
    assert held is not None
    with subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()]) as child:
        held.close()
        try:
            again = claim(tmp_path / "cell.claim")
            assert again is not None
            again.close()
        finally:
            child.kill()


def test_a_claim_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cell.claim"
    stale = FileLock(path)
    path.unlink()
    held = claim(path)
    assert held is not None and stale.take()  # a lock on a file without a name locks nothing
    stale.close()
    assert path.exists() and claim(path) is None
    held.close()
    with pytest.raises(DiskError, match="cannot be written"):
        claim(tmp_path / "no folder" / "cell.claim")


def test_jobs_of_two_processes_with_two_threads_each_are_done_once(tmp_path: Path) -> None:
    with (
        program(SHARE, str(tmp_path), "a") as (first, _),
        program(SHARE, str(tmp_path), "b") as (
            second,
            _,
        ),
    ):
        (tmp_path / "go").touch()
        assert (first.wait(60), second.wait(60)) == (0, 0)
    lines = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    assert Counter(name for name, _ in lines) == {f"j{n}": 1 for n in range(20)}
    assert {who for _, who in lines} == {"a", "b"}
    assert not list(tmp_path.glob("*.claim"))


def test_what_another_process_has_is_waited_for_and_done_if_that_dies(tmp_path: Path) -> None:
    done: list[str] = []
    told: list[str] = []

    def job(name: str) -> Job:
        return Job(name, tmp_path / name, lambda: name in done, lambda held: done.append(name))

    with program(HOLD, str(tmp_path / "b")) as (process, _):
        names = ["a", "b", "c"]
        crew = Crew(quiet=True, jobs=1)
        arguments = ([job(name) for name in names], 1, told.append, crew)
        working = threading.Thread(target=work_off, args=arguments)
        working.start()
        deadline = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done == ["a", "c"] and working.is_alive()
        process.kill()
        process.wait()
        working.join(30)
    assert done == ["a", "c", "b"]
    assert told[0] == "a" and told[1].startswith(f"b: process {process.pid} on ")
    assert told[2:] == ["c", "b"]


def test_an_error_in_a_job_ends_the_others_and_is_told(tmp_path: Path) -> None:
    def broken(held: object) -> None:
        raise DiskError("no room")

    jobs = [Job(n, tmp_path / n, lambda: False, broken) for n in ("a", "b")]
    crew = Crew(quiet=True, jobs=1)
    with pytest.raises(DiskError, match="no room"):
        work_off(jobs, 1, lambda line: None, crew)
    assert crew.stopping.is_set() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", ["done", "out_of_memory"])
def test_what_a_run_said_of_itself_stays_however_its_process_ended(
    tmp_path: Path, status: str
) -> None:
    """Its report could not be written, or its interpreter crashed on the way out."""
    write_json_atomic(tmp_path / "run.json", {"schema": 1, "status": status, "metrics": {}})
    before = (tmp_path / "run.json").read_bytes()
    for code in ("exit(1)", "import os; os.kill(os.getpid(), 9)"):
        process = subprocess.Popen([sys.executable, "-c", code])
        crew = Crew(quiet=True, jobs=1)
        crew._running.append(process)
        crew.wait(process, tmp_path)
        assert (tmp_path / "run.json").read_bytes() == before


def test_nothing_is_overwritten_where_another_process_is_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    same, grown = (make_study(None, names, 1, ()) for names in (("lora", "full"), ("lora",)))
    with program(ENTER, str(folder)) as (process, _):
        (folder / "cells" / "precious").mkdir()
        with pytest.raises(UsageError, match=r"at work .* nothing can be overwritten"):
            enter(folder, same, overwrite=True)
        with pytest.raises(UsageError, match=r"at work .* on another comparison"):
            enter(folder, grown)
        joined = enter(folder, same)  # the same may join
        with joined.ledger():
            assert not joined.leave()
        process.kill()
        process.wait()
    joined = enter(folder, grown)
    with joined.ledger():
        assert joined.leave()
    assert (folder / "cells" / "precious").is_dir()
    enter(folder, same, overwrite=True).leave()
    assert not (folder / "cells" / "precious").exists()


def test_a_folder_with_something_else_in_it_is_refused_as_it_is(tmp_path: Path) -> None:
    study = make_study(None, ("lora",), 1, ())
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not empty"):
        enter(tmp_path, study)
    with pytest.raises(UsageError, match="is a file"):
        enter(tmp_path / "thesis.txt", study)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    enter(tmp_path, study, overwrite=True).leave()
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    # What was killed before its first ledger is no foreign folder.
    begun = tmp_path / "begun"
    StudyFolder(begun).prepare(overwrite=False)
    enter(begun, study).leave()


@pytest.mark.parametrize(
    "left", [".compare.json.0123456789ab.tmp", "tuning.db", "tuning.db-journal"]
)
def test_what_a_kill_left_before_the_first_ledger_is_no_foreign_folder(
    tmp_path: Path, left: str
) -> None:
    folder, study = tmp_path / "c", make_study(None, ("lora",), 1, ())
    killed = StudyFolder(folder)
    killed.prepare(overwrite=False)
    with killed.ledger():
        killed.enter(lambda: study, "same", overwrite=False)
    killed.leave()
    (folder / left).touch()
    enter(folder, study).leave()
    assert not list(folder.glob(".*.tmp"))


def test_a_folder_is_not_judged_while_another_begins_in_it(tmp_path: Path) -> None:
    """Seen between its files: nothing is there by which the folder is a comparison's."""
    folder, study = tmp_path / "c", make_study(None, ("lora",), 1, ())
    first = StudyFolder(folder)
    first.prepare(overwrite=False)
    refused: list[Exception] = []

    def join() -> None:
        try:
            StudyFolder(folder).prepare(overwrite=False)
        except UsageError as error:
            refused.append(error)

    with first.ledger():
        first.enter(lambda: study, "same", overwrite=True)
        (folder / "report.html").touch()
        (folder / "cells" / "first.yaml").touch()
        later = threading.Thread(target=join)
        later.start()
        later.join(0.3)  # long enough to be refused, were it to be
        write_json_atomic(folder / "compare.json", {})
    later.join(60)
    assert not later.is_alive() and not refused
    first.leave()
    (folder / "compare.json").unlink()
    join()
    assert "is not empty" in str(refused)
