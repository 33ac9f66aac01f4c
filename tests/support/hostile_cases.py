"""Property tests on generated inputs: each is accepted, or refused with a SparsegradError.

``make test`` runs a few cases of every property, always the same ones. ``make test-slow`` runs
hundreds, and prints a table of the outcomes at the end (docs/explanation/security.md).
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

from sparsegrad_cli.cli.output import show_error
from sparsegrad_cli.errors import RecipeError, SparsegradError
from support.audit_events import no_side_effects
from support.hostile_summary import PROPERTY, CaseCounts

_HANGS_S = (
    30  # of CPU time, so the load of the machine does not matter; no case takes a tenth of it
)
_WAITS_S = 120  # by the clock, for a case that waits for ever
_ORDERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class CaseTimeout(BaseException):
    """A case did not end. Not an Exception, or hypothesis would try smaller cases that hang too."""


Check = Callable[..., None]


def property_test(
    what: str,
    /,
    *,
    few: int = 30,
    many: int = 300,
    shrink: bool = True,
    **cases: SearchStrategy[Any],
) -> Callable[[Check], Callable[..., None]]:
    """Make a test of ``check(**cases)``, and a slow one with many more cases.

    A case is refused if ``check`` raises a SparsegradError that is safe to display. Any other
    exception fails the test, and so does a forbidden side effect (see audit_events).

    Args:
        what: the property, for the table.
        few, many: number of cases in ``make test`` (0: none) and in ``make test-slow``.
        shrink: search for a smaller failing case.
        cases: strategies for the arguments of ``check``.
    """

    def decorated(check: Check) -> Callable[..., None]:
        counts = {"few": few, "many": pytest.param(many, marks=pytest.mark.slow)}
        counts = {name: count for name, count in counts.items() if count}

        @pytest.mark.parametrize("count", counts.values(), ids=list(counts))
        def test(count: int, record_property: Callable[[str, object], None]) -> None:
            counts_by_outcome: Counter[str] = Counter()

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
                _try(check, case, counts_by_outcome)

            try:
                every()
            finally:
                counted = (counts_by_outcome[name] for name in CaseCounts._fields[1:])
                record_property(PROPERTY, [what, *counted])

        test.__doc__ = check.__doc__
        return test

    return decorated


def _try(check: Check, case: dict[str, Any], counts_by_outcome: Counter[str]) -> None:
    counts_by_outcome["cases"] += 1
    try:
        with time_limit(), no_side_effects():
            check(**case)
    except SparsegradError as error:
        check_error(error)
        counts_by_outcome["refused"] += 1
    except CaseTimeout as stuck:
        counts_by_outcome["tracebacks"] += 1
        raise CaseTimeout(f"{stuck}: {case!r:.3000}") from None
    except BaseException:
        counts_by_outcome["tracebacks"] += 1
        raise
    else:
        counts_by_outcome["accepted"] += 1


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise CaseTimeout if the block computes or waits for too long."""

    def stop(number: int, _: object) -> None:
        ran = f"running after {_HANGS_S} s of processor time"
        waited = f"waiting after {_WAITS_S} s"
        raise CaseTimeout(f"still {ran if number == signal.SIGVTALRM else waited}")

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
    """Check that an error says what and where and displays safely; return what is displayed."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        show_error(error)
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
    """Check that text is safe for a terminal: no control or direction characters, encodable."""
    screen.encode("utf-8")
    odd = {c for c in screen if not c.isprintable() and c not in "\n\t\u3000\xa0"}
    odd -= {c for c in odd if _shows_nothing(c)}
    assert not odd, f"on the screen: {sorted(map(ascii, odd))}"


def _shows_nothing(character: str) -> bool:
    """Return whether a character that Python calls unprintable is harmless.

    Such are other spaces, unassigned and private characters, and joiners of emoji and scripts.
    """
    import unicodedata

    kind = unicodedata.category(character)
    return kind in ("Zs", "Zl", "Zp", "Cn", "Co") or (kind == "Cf" and character not in _ORDERS)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Work in an empty folder, and check that nothing is written beside it."""
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


def folder_content(folder: Path) -> dict[str, bytes | str]:
    """Return the bytes of all files and the targets of all links below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found
