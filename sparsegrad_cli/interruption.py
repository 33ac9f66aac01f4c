"""Ctrl-C and SIGTERM: the first asks the run to stop, the second stops it at once. No torch.

A run is asked politely while it computes: it looks between two batches (:func:`stop_here`), and
leaves what it was doing whole. Elsewhere, while models and data load, KeyboardInterrupt is raised.
A thread says at once that the signal was heard, and says so when stopping takes long: python's own
handlers wait until a library's call, such as an eigen-decomposition, returns.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sparsegrad_cli import distributed
from sparsegrad_cli.errors import InterruptedRunError

PATIENCE_S = 20.0  # after which a run that has not stopped says why not
_INSIST_S = 10.0  # for a run that was asked twice to write its status, before the process ends
_SAME_S = 1.0  # SIGINT and SIGTERM so close together are one request, from two senders
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Requests:
    """Tells a second request from the echo of the first."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # signal, time

    def insists(self, number: int) -> bool:
        """Whether a signal that has just come asks for the second time."""
        if self._first is None:
            self._first = (number, time.monotonic())
            return False
        return number == self._first[0] or time.monotonic() - self._first[1] > _SAME_S


class _Stop:
    """What the signals of this process have asked for."""

    def __init__(self, tell: Callable[[str], None], again: str) -> None:
        self.tell, self.again = tell, again
        self.phase, self.busy = "start", "start"
        self.polite = self.asked = False
        self._requests = _Requests()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first request, where the run looks for it; raise for any other."""
        wait = self.polite and not self._requests.insists(number)
        self.asked = True
        if not wait:
            raise KeyboardInterrupt


_current: _Stop | None = None


@contextmanager
def signals_stop_the_run(tell: Callable[[str], None], again: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the run with InterruptedRunError or KeyboardInterrupt.

    Args:
        tell: called from another thread with what the user should know of a stop under way.
        again: how to go on later, for the error.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _current = _current, _Stop(tell, again)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _current.handle) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(_current, reader), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # ends the watcher
        watcher.join()
        reader.close()
        _current = outer


def _watch(stop: _Stop, reader: socket.socket) -> None:
    """Say what becomes of a request; end the process where python cannot.

    Args:
        reader: gives the number of every signal, even of one that python has not handled yet;
            closed once the run has ended.
    """
    requests, polite, deadline = _Requests(), True, None
    while True:
        reader.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            got = reader.recv(1)
        except TimeoutError:
            if not polite:
                os._exit(InterruptedRunError.exit_code)
            deadline = None
            stop.tell(
                f"not stopped after {PATIENCE_S:.0f} s: {stop.phase} cannot leave {stop.busy} "
                "halfway; a second signal ends the process at once"
            )
            continue
        if not got:
            return
        if got[0] not in _SIGNALS:
            continue
        first, insists = deadline is None and polite, requests.insists(got[0])
        polite = polite and stop.polite and not insists
        if not polite:
            deadline = time.monotonic() + _INSIST_S
        elif first:
            deadline = time.monotonic() + PATIENCE_S
            stop.tell(f"asked to stop: {stop.phase} ends at the next point where it can")


@contextmanager
def politely() -> Iterator[None]:
    """Inside, the first request waits for :func:`stop_here` instead of raising where it comes."""
    stop = _current
    if stop is None:
        yield
        return
    stop.polite = True
    try:
        yield
    finally:
        stop.polite = False


def enter(phase: str) -> None:
    """A phase begins."""
    if _current is not None:
        _current.phase = _current.busy = phase


def busy(what: str) -> None:
    """Something begins that cannot be left halfway."""
    if _current is not None:
        _current.busy = what


def asked(*, together: bool = True) -> bool:
    """Whether the run is to stop.

    Args:
        together: all processes of the run ask at this point, and get the same answer.
    """
    here = _current is not None and _current.asked
    return distributed.any(here) if together else here


def stop_here(what: str, *, together: bool = True) -> None:
    """Stop if that was asked for; else ``what`` comes next.

    Raises:
        InterruptedRunError: says in which phase the run stops.
    """
    stop = _current
    if asked(together=together):
        phase, again = (stop.phase, stop.again) if stop else ("", None)
        raise InterruptedRunError(f"stopped in {phase}", fix=again)
    busy(what)


def _forget() -> None:
    """A forked worker's signals are its own: the parent must not hear of them."""
    if _current is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
