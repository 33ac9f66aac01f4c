"""What the generated cases came to, at the end of a session."""

from __future__ import annotations

from typing import Any

from hostility import COUNTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of all properties tried, as docs/hostile.md has it."""
    if not COUNTS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("hostile cases")
    write("| property | cases | refused | accepted | tracebacks |")
    write("| --- | --: | --: | --: | --: |")
    for what, count in sorted(COUNTS.items()):
        numbers = (count.cases, count.refused, count.accepted, count.tracebacks)
        write(f"| {what} | {' | '.join(f'{n:,}' for n in numbers)} |")
    total = [sum(getattr(c, k) for c in COUNTS.values()) for k in vars(next(iter(COUNTS.values())))]
    write(f"| all | {' | '.join(f'{n:,}' for n in total)} |")
