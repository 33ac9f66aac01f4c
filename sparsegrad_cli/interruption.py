"""Handle Ctrl-C and SIGTERM: the first signal asks the run to stop, the second stops it at once.

While a run computes (:func:`deferred_interrupt`), the first signal only sets a flag. The run checks
it between two batches (:func:`raise_if_requested`), so that no step is left half done. Elsewhere,
while models and data load, a signal raises KeyboardInterrupt where it arrives.

Python runs its signal handlers only between two of its own instructions, so a long call into a
library, such as an eigendecomposition, delays them. A thread therefore tells the user at once that
the signal was received, and again when stopping takes long. Imports no torch.
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

PATIENCE_S = 20.0  # Then the user is told why the run has not stopped yet.
_FORCED_EXIT_S = 10.0  # Time to write the record after the second signal.
_SAME_REQUEST_S = 1.0  # SIGINT and SIGTERM this close together count as one request.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Requests:
    """The requests of this process; tells a second request from a repetition of the first."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # signal number, time

    def insists(self, number: int) -> bool:
        """Return whether a signal that has just arrived is the second request."""
        if self._first is None:
            self._first = (number, time.monotonic())
            return False
        return number == self._first[0] or time.monotonic() - self._first[1] > _SAME_REQUEST_S


class _State:
    """The state of this process: what signals have requested, and what the process is doing."""

    def __init__(self, tell: Callable[[str], None], again: str) -> None:
        self.tell, self.again = tell, again
        self.phase = self.activity = "start"
        self.deferred = self.requested = self.finishing = False
        self._requests = _Requests()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag for a first request that is deferred; raise for any other."""
        wait = self.deferred and not self._requests.insists(number)
        self.requested = True
        if not wait:
            raise KeyboardInterrupt


_current: _State | None = None


@contextmanager
def handle_signals(tell: Callable[[str], None], again: str) -> Iterator[None]:
    """End the run inside with InterruptedRunError or KeyboardInterrupt on SIGINT or SIGTERM.

    Args:
        tell: called from another thread with messages for the user about the stop under way.
        again: how to continue later, for the error.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _current = _current, _State(tell, again)
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
        writer.close()  # This ends the watcher.
        watcher.join()
        reader.close()
        _current = outer


def _watch(state: _State, reader: socket.socket) -> None:
    """Tell the user how a request is handled; end the process where Python cannot.

    Args:
        reader: yields the number of every signal, even of one that Python has not handled yet. It
            is closed when the run has ended.
    """
    requests, deferred, deadline = _Requests(), True, None
    while True:
        reader.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
        try:
            got = reader.recv(1)
        except TimeoutError:
            if not deferred:
                os._exit(InterruptedRunError.exit_code)
            deadline = None
            state.tell(
                f"not stopped after {PATIENCE_S:.0f} s: {_delay(state)}; a second signal ends the "
                "process at once"
            )
            continue
        if not got:
            return
        if got[0] not in _SIGNALS:
            continue
        first, insists = deadline is None and deferred, requests.insists(got[0])
        deferred = deferred and state.deferred and not insists
        if not deferred:
            deadline = time.monotonic() + _FORCED_EXIT_S
        elif first:
            deadline = time.monotonic() + PATIENCE_S
            state.tell(
                f"asked to stop: training is over, and the run ends after {state.phase}"
                if state.finishing
                else f"asked to stop: {state.phase} ends at the next point where it can"
            )


def _delay(state: _State) -> str:
    """Return why the run has not stopped yet."""
    if state.activity == state.phase:
        return f"{state.phase} is not over yet"
    return f"{state.phase} cannot leave {state.activity} halfway"


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defer the first request inside until the next call of :func:`raise_if_requested`."""
    state = _current
    if state is None:
        yield
        return
    state.deferred = True
    try:
        yield
    finally:
        state.deferred = False


def set_phase(phase: str, *, finishing: bool = False) -> None:
    """Name the phase that begins, for messages to the user.

    Args:
        finishing: whether the run no longer checks for a request: it ends as done.
    """
    if _current is not None:
        _current.phase = _current.activity = phase
        _current.finishing = finishing


def set_activity(activity: str) -> None:
    """Name the activity that begins now and cannot be interrupted, for messages to the user."""
    if _current is not None:
        _current.activity = activity


def requested(*, together: bool = True) -> bool:
    """Return whether the run should stop.

    Args:
        together: whether all processes of the run call this at the same point. They then get the
            same answer.
    """
    here = _current is not None and _current.requested
    return distributed.any(here) if together else here


def raise_if_requested(next_activity: str, *, together: bool = True) -> None:
    """Stop the run here if that was requested; otherwise set ``next_activity`` as the activity.

    Args:
        together: as in :func:`requested`.

    Raises:
        InterruptedRunError: the run was asked to stop; names its phase.
    """
    state = _current
    if requested(together=together):
        phase, again = (state.phase, state.again) if state else ("", None)
        raise InterruptedRunError(f"stopped in {phase}", fix=again)
    set_activity(next_activity)


def _disconnect_child() -> None:
    """Keep the signals of a forked worker from the parent's watcher."""
    if _current is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_disconnect_child)
