"""What a study's page needs of its compare.json, small enough to be kept beside the page.

python -m benchmarks.slim runs/STUDY docs/results/STUDY.json

Every run keeps its hashes, digest and commit, its evaluations, counts and times, and the peak of
each phase by category. Spectra of bases, heat maps and per-step records are removed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_TOP = ("schema", "name", "status", "command", "match", "jobs", "methods", "tasks", "seeds")
_SAID = ("environment", "git", "parity", "tuning", "rows", "tests", "checks")
_PEAK = ("peak_bytes", "categories")


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the record without the data that only a report's figures use."""
    kept = {key: record.get(key) for key in (*_TOP, *_SAID)}
    kept["cells"] = [_cell(cell) for cell in record["cells"]]
    return kept


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    kept = {key: cell[key] for key in ("task", "method", "seed", "status")}
    run = cell["run"]
    if run is None:
        return kept
    kept |= {key: run.get(key) for key in ("git", "recipe_digest", "time")}
    counts, hashes = run.get("counts") or {}, run.get("hashes") or {}
    kept["counts"] = {key: value for key, value in counts.items() if key != "targets"}
    chains = {name: _last(hashes[name]) for name in ("order", "rows") if hashes.get(name)}
    kept["hashes"] = {**hashes, **chains}
    metrics, memory = run.get("metrics") or {}, run.get("memory") or {}
    kept["history"] = [
        {key: point.get(key) for key in ("step", "epoch", "score", "loss")}
        for point in metrics.get("history", ())
    ]
    kept["peaks"] = {
        phase: {key: peak.get(key) for key in _PEAK}
        for phase, peak in memory.get("phases", {}).items()
    }
    calibration = run.get("calibration") or {}
    kept["calibration"] = {
        key: calibration.get(key) for key in ("steps", "seconds", "peak_bytes", "settings")
    }
    return kept


def _last(chain: dict[str, str]) -> dict[str, str]:
    """Keep only the digest of the last step of a chain, since it covers all steps before it."""
    last = max(chain, key=int)
    return {last: chain[last]}


def main() -> None:
    """Read a study's record and write the reduced copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    record = json.loads((asked.study / "compare.json").read_text(encoding="utf-8"))
    text = json.dumps(slim(record), indent=1, allow_nan=False)
    asked.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
