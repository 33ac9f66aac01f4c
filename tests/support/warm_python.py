"""Run Python programs without importing the libraries again.

A fresh process imports torch, transformers and peft for longer than most tests run. The fixture
``warm_python`` (tests/conftest.py) replaces ``sys.executable`` by a small client. The client sends
its arguments, environment, working folder and standard streams to a server that has imported the
libraries once, and the server runs the program in a fork. The client passes signals on and exits
as the program does. If the client is killed, the program is killed too.

The programs write reports with empty figures. A test of imports, of figures or of process IDs
starts a real Python instead.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
_LIBRARIES = (
    "datasets",
    "evaluate",
    "peft",
    "sklearn.metrics",
    "scipy.stats",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "sparsegrad_cli.cli.app",
    "sparsegrad_cli.export.export_run",
    "sparsegrad_cli.report.render",
    "sparsegrad_cli.study.coordinator",
    "sparsegrad_cli.training.fine_tuning",
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_CLIENT = """\
#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
data = json.dumps(job).encode()
socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
server.sendall(data)
for number in {signals}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
answer = server.recv(4)
code = int.from_bytes(answer, "big", signed=True) if answer else 1
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def warm_server() -> Iterator[str]:
    """Start the server; yield the path of the client, which takes the place of ``python``."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # A socket's path has at most 107 bytes.
    address, client = folder / "socket", folder / "python"
    numbers = [int(number) for number in _SIGNALS]
    client.write_text(_CLIENT.format(python=sys.executable, address=str(address), signals=numbers))
    client.chmod(0o755)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "support.warm_python", str(address), str(client)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n", "the server did not start"
        yield str(client)
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
        shutil.rmtree(folder)


def run_two_ranks(client: str, work: Callable[..., None], folder: Path, *more: object) -> None:
    """Call ``work(rank, folder, *more)`` in two processes and wait for both.

    Args:
        client: the program of :func:`warm_server`.
        work: a function of a module. It joins the process group itself.
        folder: passed on as text.
        more: literals.

    Raises:
        RuntimeError: one of the processes failed; the other is then killed.
    """
    code = "from {} import {} as work; work({}, *{!r})"
    ranks = [
        subprocess.Popen(
            [client, "-c", code.format(work.__module__, work.__name__, rank, (str(folder), *more))],
            stdin=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    ]
    try:
        while None in (codes := [rank.poll() for rank in ranks]) or any(codes):
            if any(codes):
                raise RuntimeError(f"the two processes exited with {codes}; see their output")
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _serve(address: str, client: str) -> None:
    """Fork a keeper for every client until standard input ends."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    from sparsegrad_cli.report import svg

    svg.to_svg = lambda figure: "<svg></svg>"
    sys.executable = client
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The system then reaps the keepers.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([listening, sys.stdin], [], [])[0]):
            assert ready
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> None:
    """Run the client's program; pass signals to it and its exit code to the client. Exit."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    job = json.loads(_read(connection, int.from_bytes(header, "big")))
    program = os.fork()
    if program == 0:
        connection.close()
        _run(job, streams)
    for stream in streams:
        os.close(stream)
    # Linux tells when the program ends; elsewhere the keeper looks at times.
    end = [os.pidfd_open(program)] if hasattr(os, "pidfd_open") else []
    listening: list[socket.socket] = [connection]
    while True:
        watched: list[socket.socket | int] = [*listening, *end]
        ready = select.select(watched, [], [], None if end else 0.05)[0]
        if connection in ready:
            try:
                told = connection.recv(16)
            except ConnectionError:
                told = b""
            listening = [connection] if told else []
            for number in told or [signal.SIGKILL]:
                os.kill(program, number)
        ended, status = os.waitpid(program, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            with suppress(OSError):
                connection.sendall(code.to_bytes(4, "big", signed=True))
            os._exit(0)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return data


def _run(job: dict[str, Any], streams: list[int]) -> None:
    """Run the program in this process as ``python`` does, and exit with its code."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # The server's own stream objects remember whether its streams can seek.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        _as_main(job["arguments"])
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    with suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _as_main(arguments: list[str]) -> None:
    """Interpret ``[-u] [-P] (-m MODULE | -c CODE | SCRIPT) [ARGUMENT ...]``."""
    isolated = False
    while arguments[0] in ("-u", "-P"):
        isolated |= arguments.pop(0) == "-P"
    kind, code = arguments[0], arguments[1:2]
    sys.argv = [kind, *arguments[2:]] if kind in ("-m", "-c") else arguments
    if not isolated:
        sys.path.insert(0, "" if kind in ("-m", "-c") else str(Path(kind).resolve().parent))
    if kind == "-m":
        runpy.run_module(code[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(code[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
