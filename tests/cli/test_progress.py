"""What commands show while they work: bars on a terminal, and plain lines in a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.cli_runs import Cli
from support.small_runs import base_folder, data_folder

from sparsegrad_cli.cli.progress import (
    LineObserver,
    TerminalObserver,
    Work,
    clock,
    work_line,
)
from sparsegrad_cli.predict.classifier import Classifier

WIDTHS = (80, 60)


def drawn(work: Work, width: int, *, ended: bool = False) -> list[str]:
    """Return the lines of some work at a width, as they are on the screen."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(work_line(work, width, ended=ended))
    file: Any = console.file
    return str(file.getvalue()).splitlines()


def large_work(name: str = "train") -> Work:
    """Return work with counts, times and values of a long run."""
    work = Work(name, 1_234_567, done=1_000_000)
    work.done, work.left = 1_000_001, 90_000.0
    work.began -= 360_000
    work.values = {
        "rss": "RSS 123.4 GiB",
        "rate": "123.4 steps/s",
        "loss": "loss 12.3456",
        "score": "perplexity 1,234.567",
    }
    return work


@pytest.mark.parametrize("width", [200, 120, *WIDTHS, 40, 24])
def test_the_step_count_is_never_cut(width: int) -> None:
    lines = drawn(large_work(), width)
    assert "1,000,001/1,234,567 steps" in lines[0] if width > 24 else "1,000,001/" in lines[0]
    assert all(len(line) <= width for line in lines) and len(lines) <= 2
    if width >= 60:
        assert "elapsed 100:00:0" in lines[0] and ("ETA 25:00:00" in lines[0]) == (width >= 80)
        assert "loss 12.3456" in "".join(lines)


def test_a_long_name_is_cut_before_the_count() -> None:
    (first, *_) = drawn(large_work("sparsegrad rank 64 seed 3705 builtin:acceptability"), 60)
    assert first.startswith("sparseg") and "1,000,001/1,234,567 steps" in first
    assert len(first) <= 60


@pytest.mark.parametrize("width", WIDTHS)
def test_work_that_is_over_has_no_eta(width: int) -> None:
    (first, *_) = drawn(large_work(), width, ended=True)
    assert "elapsed" in first and "ETA" not in first


def test_the_eta_counts_the_steps_of_this_process_alone() -> None:
    work = Work("train", 100, done=40)
    assert work.eta is None
    work.done = 50
    work.began -= 20.0
    assert work.eta == pytest.approx(20.0 / 10 * 50, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-:--"), (float("inf"), "-:--"), (0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")],
)
def test_a_clock_reads_as_minutes_or_hours(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_the_bar_shows_the_last_score() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with TerminalObserver(console) as observer:
        observer.phase("train", "full")
        observer.total_steps("train", 2)
        scored: dict[str, Any] = {"metric": "accuracy", "epoch": 1.0, "loss": 0.7}
        for step, score in ((1, 0.25), (2, 0.75)):
            observer.step("train", {"step": step, "loss": 0.5})
            observer.evaluated({**scored, "step": step, "score": score})
    file: Any = console.file
    last = [line for line in file.getvalue().splitlines() if "2/2 steps" in line][-1]
    assert "score 75.0" in last and "25.0" not in last


def test_a_pipe_gets_a_line_for_each_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    with LineObserver() as observer:
        observer.phase("calibrate", "2 steps, no update")
        observer.total_steps("warm-up", 3)
        for step in (1, 2, 3):
            observer.step("warm-up", {"step": step, "loss": 0.7})
        observer.total_steps("calibrate", 2)
        for step in (1, 2):
            observer.step("calibrate", {"step": step, "loss": 0.7})
        observer.phase("train", "lora")
        observer.note("a note with [brackets]\x1b[2J and a control sequence")
        observer.total_steps("train", 4)
        for step in (1, 2, 3, 4):
            observer.step("train", {"step": step, "steps_per_s": 2.0})
            if step % 2 == 0:  # As with train.logging_steps=2.
                observer.step("train", {"step": step, "loss": 0.5, "steps_per_s": 2.0})
        observer.total_steps("evaluate", 2, unit="batches")
        observer.step("evaluate", {"step": 1})
        observer.evaluated(
            {"step": 4, "epoch": 1.0, "metric": "accuracy", "score": 0.5, "loss": 0.7}
        )
    lines = [
        re.sub(r"after .*|elapsed.*", "…", line) for line in capsys.readouterr().err.split("\n")
    ]
    assert lines == [
        "calibrate: 2 steps, no update",
        "warm-up: 3/3 steps …",
        "calibrate: 2/2 steps, ended …",
        "train: lora",
        "note: a note with [brackets] [2J and a control sequence",
        "train: step 2 of 4, loss 0.5000, 2.0 steps/s, …",
        "train: step 4 of 4, loss 0.5000, 2.0 steps/s, …",
        "evaluate: step 4, epoch 1.00, score 50.0, loss 0.7000",
        "train: 4/4 steps, ended …",
        "",
    ]


# --- the real commands, on a pseudo-terminal and in a pipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a folder, and the arguments of a run of six steps on a tiny model in it."""
    folder = tmp_path_factory.mktemp("progress")
    base = base_folder(folder / "base")
    data = data_folder(folder / "data")
    settings = (
        f"model={base} task=csv task.path={data} task.max_length=16 train.max_steps=6 "
        "train.eval_strategy=steps train.eval_steps=3 train.logging_steps=2 train.use_cpu=true "
        "train.per_device_train_batch_size=8 train.per_device_eval_batch_size=8 "
        "calibration.steps=3 calibration.warmup_steps=4"
    )
    return folder, settings.split()


@pytest.fixture
def on_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """``on_terminal(80, "train", ...)``: a command whose stderr is a terminal of that width.

    It returns what was drawn, without control sequences, and standard output.
    """
    # Figures take most of the time of a small run.
    monkeypatch.setattr("sparsegrad_cli.report.svg.to_svg", lambda figure: "<svg></svg>")
    monkeypatch.setenv("TERM", "xterm")

    def run(columns: int, *arguments: str) -> tuple[str, str]:
        terminal, inner = pty.openpty()
        size = struct.pack("HHHH", 40, columns, 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
        drawn: list[bytes] = []
        reader = threading.Thread(target=read_all, args=(terminal, drawn))
        reader.start()
        with monkeypatch.context() as patched, os.fdopen(inner, "w", encoding="utf-8") as stream:
            patched.setenv("COLUMNS", str(columns))
            patched.setattr(sys, "stderr", stream)
            outcome = cli(*arguments)
        reader.join()
        os.close(terminal)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(drawn).decode())
        assert outcome.code == 0, text
        return text, outcome.out

    return run


def read_all(terminal: int, found: list[bytes]) -> None:
    """Read a terminal until its other end is closed, which Linux reports as an error."""
    try:
        while part := os.read(terminal, 65536):
            found.append(part)
    except OSError:
        return


def lines_of(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", WIDTHS)
def test_train_shows_every_phase_on_a_terminal(
    inputs: tuple[Path, list[str]], on_terminal: Callable[..., tuple[str, str]], columns: int
) -> None:
    folder, settings = inputs
    text, out = on_terminal(columns, "train", *settings, "-o", str(folder / f"run-{columns}"))
    assert all(len(line) <= columns for line in lines_of(text))
    for phase in ("load", "calibrate", "train", "report"):
        assert any(line.startswith(f"{phase} ") for line in lines_of(text)), phase
    for count in ("4/4 steps", "3/3 steps", "6/6 steps"):
        assert count in text
    assert re.search(r"/6 steps  elapsed [\d:]+  ETA [-\d:]+", text)
    assert "Best validation score" in out and "elapsed" not in out


def test_predictions_go_to_standard_output_beside_a_terminal(
    inputs: tuple[Path, list[str]], on_terminal: Callable[..., tuple[str, str]]
) -> None:
    folder, _ = inputs
    rows = str(folder / "data/validation.csv")
    text, out = on_terminal(80, "predict", str(folder / "run-80"), rows)
    assert len(out.splitlines()) == 25 and out.splitlines()[0].endswith("prediction,probability")
    assert "24/24 rows" in text and "prediction,probability" not in text


@pytest.mark.parametrize(("command", "more"), [("predict", ()), ("evaluate", ("--resamples", "0"))])
def test_a_file_shows_an_eta_after_its_first_batch(
    inputs: tuple[Path, list[str]],
    on_terminal: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    more: tuple[str, ...],
) -> None:
    folder, _ = inputs
    whole = Classifier._logits

    def slow(self: Classifier, rows: list[dict[str, list[int]]]) -> Any:
        time.sleep(0.3)  # More than the terminal takes to draw again.
        return whole(self, rows)

    monkeypatch.setattr(Classifier, "_logits", slow)
    options = (str(folder / "run-80"), str(folder / "data/validation.csv"), "--batch-size", "6")
    text, _ = on_terminal(80, command, *options, *more)
    for rows in (6, 12):
        assert re.search(rf"{command} .*{rows}/24 rows  elapsed 0:0\d  ETA 0:0\d", text)
    assert all(len(line) <= 80 for line in lines_of(text))


def test_train_writes_plain_lines_into_a_pipe(
    inputs: tuple[Path, list[str]], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = inputs
    monkeypatch.setattr("sparsegrad_cli.report.svg.to_svg", lambda figure: "<svg></svg>")
    found = cli("train", *settings, "method=full", "-o", str(folder / "piped"))
    assert found.code == 0, found.err
    assert "\x1b" not in found.err and "\r" not in found.err
    lines = found.err.splitlines()
    steps = [line for line in lines if line.startswith("train: step")]
    assert [line.partition(",")[0] for line in steps] == [
        f"train: step {n} of 6" for n in (2, 4, 6)
    ]
    assert all(re.search(r"elapsed [\d:]+, ETA [\d:]+$", line) for line in steps)
    assert len([line for line in lines if line.startswith("evaluate: step")]) == 3
    assert any(line.startswith("train: 6/6 steps, ended after") for line in lines)
    assert any(line.startswith("load: ended after") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_compare_shows_all_runs_on_a_terminal(
    inputs: tuple[Path, list[str]], on_terminal: Callable[..., tuple[str, str]], jobs: str
) -> None:
    folder, settings = inputs
    study = str(folder / f"study-{jobs}")
    arguments = ("--methods", "full,lora", "--seeds", "1", "--jobs", jobs, "-o", study)
    text, out = on_terminal(60, "compare", *settings, *arguments)
    lines = lines_of(text)
    assert all(len(line) <= 60 for line in lines)
    assert any(line.startswith("compare ") and "0/2 runs" in line for line in lines)
    assert len([line for line in lines if ": done, score" in line]) == 2
    assert "lora" in out
