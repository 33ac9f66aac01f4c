"""Interleave the sides of a benchmark, take medians, report ratios and save the numbers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsegrad_cli.records.base import now
from sparsegrad_cli.records.environment import collect, git_state


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each side in each round.

    Every round runs every side once, after a warm-up.

    Args:
        sides: what to time, by name.
        rounds: how often.
        clock: wall time by default; ``time.process_time`` for the CPU time of all threads.
    """
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = clock()
            side()
            seconds[name].append(clock() - started)
    return seconds


def ratios(seconds: Mapping[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    """Return the median seconds, and the median and quartiles of the ratio to ``against``.

    Ratios are taken within each round.
    """
    table = {}
    for name, times in seconds.items():
        each = [t / base for t, base in zip(times, seconds[against], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
        table[name] = {
            "median_s": statistics.median(times),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
        }
    return table


def save(path: Path | None, name: str, content: Mapping[str, Any]) -> None:
    """Write the result as JSON with versions, machine and commit; without a path, print it."""
    record = {
        "benchmark": name,
        "when": now(),
        "environment": collect().to_json(),
        "git": git_state(Path(__file__).parent).to_json(),
        **content,
    }
    text = json.dumps(record, indent=1)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
