"""Programs that run in forks (tests/support/warm_python.py) behave as under a real Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPORT = "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read())"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.mark.parametrize("kind", ["-c", "script"])
def test_arguments_folder_environment_and_streams_arrive(
    kind: str, warm_client: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(REPORT)
    program = ("-c", REPORT) if kind == "-c" else ("script.py",)
    said = [
        subprocess.run(
            [python, *program, "a", "b c"],
            cwd=tmp_path,
            env=os.environ | {"WORD": "é"},
            input="typed",
            capture_output=True,
            text=True,
        )
        for python in (sys.executable, warm_client)
    ]
    assert said[0].returncode == said[1].returncode == 0, said[1].stderr
    assert said[0].stdout == said[1].stdout != ""


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('stop')", 1, "stop"),
        ("raise KeyError('missing')", 1, "KeyError: 'missing'"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.kill(os.getpid(), 15)", -15, ""),
    ],
)
def test_exit_codes_and_errors_are_those_of_the_program(
    warm_client: str, program: str, code: int, error: str
) -> None:
    done = subprocess.run([warm_client, "-c", program], capture_output=True, text=True)
    assert (done.returncode, error in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_program(warm_client: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [warm_client, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as client:
        assert client.stdout is not None
        program = int(client.stdout.readline())
        client.send_signal(number)
        assert client.wait(60) == (1 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{program}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(program, 0)


def test_fixture_replaces_the_python_of_new_processes(warm_python: None) -> None:
    program = "import sys; print('transformers' in sys.modules, sys.executable)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", sys.executable], done.stderr
