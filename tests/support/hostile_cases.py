"""Generated cases against a property: each is accepted, or refused by an error of ours.

``make test`` tries a few of every property, the same ones every time; ``make test-slow`` hundreds,
and ends with a table of what became of them (docs/hostile.md).
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from sparsegrad_cli.cli.errors import show
from sparsegrad_cli.errors import RecipeError, SparsegradError
from support.audit_events import nothing_done
from support.hostile_summary import PROPERTY, Tried

_HANGS_S = 30  # of processor time, whatever else the machine does: no case takes a tenth of it
_WAITS_S = 120  # by the clock: for what will never come
_ORDERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Stuck(BaseException):
    """A case that did not end. No Exception: each smaller one that hypothesis tried would hang."""


Judge = Callable[..., None]


def holds(
    what: str,
    /,
    *,
    few: int = 30,
    many: int = 300,
    shrink: bool = True,
    **cases: SearchStrategy[Any],
) -> Callable[[Judge], Callable[..., None]]:
    """Make a test of ``judge(**cases)``, and a slow one of many more cases.

    A case is refused where ``judge`` raises a SparsegradError, which must be fit to be shown; any
    other exception fails the test, and so does what no case may do (see watching).

    Args:
        what: the property, for the table.
        few, many: cases by ``make test`` (0 leaves it to the other), and by ``make test-slow``.
        shrink: look for a smaller case where one fails.
        cases: what the arguments of ``judge`` are drawn from.
    """

    def decorated(judge: Judge) -> Callable[..., None]:
        counts = {"few": few, "many": pytest.param(many, marks=pytest.mark.slow)}
        counts = {name: count for name, count in counts.items() if count}

        @pytest.mark.parametrize("count", counts.values(), ids=list(counts))
        def test(count: int, record_property: Callable[[str, object], None]) -> None:
            tally: Counter[str] = Counter()

            @settings(
                max_examples=count,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            )
            @given(**cases)
            def every(**case: Any) -> None:
                _try(judge, case, tally)

            try:
                every()
            finally:
                counted = (tally[name] for name in Tried._fields[1:])
                record_property(PROPERTY, [what, *counted])

        test.__doc__ = judge.__doc__
        return test

    return decorated


def _try(judge: Judge, case: dict[str, Any], tally: Counter[str]) -> None:
    tally["cases"] += 1
    try:
        with no_hang(), nothing_done():
            judge(**case)
    except SparsegradError as error:
        check_error(error)
        tally["refused"] += 1
    except Stuck as stuck:
        tally["tracebacks"] += 1
        raise Stuck(f"{stuck}: {case!r:.3000}") from None
    except BaseException:
        tally["tracebacks"] += 1
        raise
    else:
        tally["accepted"] += 1


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """What runs for minutes, or waits for ever, is a fault and would stop all tests: stop it."""

    def stop(number: int, _: object) -> None:
        ran = f"running after {_HANGS_S} s of processor time"
        waited = f"waiting after {_WAITS_S} s"
        raise Stuck(f"still {ran if number == signal.SIGVTALRM else waited}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANGS_S)
    signal.setitimer(signal.ITIMER_REAL, _WAITS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def check_error(error: SparsegradError) -> str:
    """An error that says what and where, and whose block on the screen obeys no one; the block."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        show(error)
    block = shown.getvalue()
    check_harmless(block)
    assert error.what.strip()
    if isinstance(error, RecipeError):
        assert error.problems
        for problem in error.problems:
            assert problem.key and problem.what and problem.file
        assert str(error)
    else:
        assert error.where, error
    return block


def check_harmless(screen: str) -> None:
    """Text for a terminal: no control but line breaks, no turning of the direction, encodable."""
    screen.encode("utf-8")
    odd = {c for c in screen if not c.isprintable() and c not in "\n\t\u3000\xa0"}
    odd -= {c for c in odd if _shows_nothing(c)}
    assert not odd, f"on the screen: {sorted(map(ascii, odd))}"


def _shows_nothing(character: str) -> bool:
    """Not printable to Python, and yet no order: other spaces, unassigned and private characters,
    joiners of emoji and scripts."""
    import unicodedata

    kind = unicodedata.category(character)
    return kind in ("Zs", "Zl", "Zp", "Cn", "Co") or (kind == "Cf" and character not in _ORDERS)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty working folder inside another: what is written beside it shows."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as outside:
        inside = Path(outside).resolve() / "work"
        inside.mkdir()
        os.chdir(inside)
        try:
            yield inside
        finally:
            os.chdir(here)
            assert list(Path(outside).resolve().iterdir()) == [inside]


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: bytes of files, targets of links; to tell whether it changed."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found
